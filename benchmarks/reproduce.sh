#!/usr/bin/env bash
# Runs what is missing in benchmarks/results/ on one GPU. What is in the files already is not repeated.
#
# usage: benchmarks/reproduce.sh [PART...]   (default: all; see the functions below and benchmarks/README.md)
# LIMIT      seconds; nothing is started after them, and what then still runs is stopped (default: no limit)
# PYTHON     interpreter (default: .venv/bin/python)
# JOBS       trainings at a time (default: 12, which keeps 16 cores busy). Processes take turns on a GPU, launch gaps
#            included, unless CUDA MPS serves them (nvidia-cuda-mps-control -d): 0.6 in place of 2.3 s a step on nuclei.
# COMMIT     recorded in the results (default: asked of git)
# Trainings need data/camvid, data/bccd, data/nuclei and data/weights.
set -uo pipefail
cd "$(dirname "$0")/.."

limit=${LIMIT:-1000000}
python=${PYTHON:-.venv/bin/python}
commit=(${COMMIT:+--commit "$COMMIT"})
missing=0
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}  # also without `pip install -e .`
results=benchmarks/results
rates=$results/rates.json

run() {  # script and arguments
    local left=$((limit - SECONDS))
    [ "$left" -gt 0 ] || { missing=1; return; }
    local common=("${commit[@]}" --time-limit $((left > 30 ? left - 15 : left)))
    timeout --kill-after 2 "$left" "$python" "$1" "${common[@]}" "${@:2}" || missing=1
}
train() {  # name of the result, options
    run benchmarks/grid.py --jobs "${JOBS:-12}" --cfg-options train_dataloader.num_workers=2 val_dataloader.num_workers=2 \
        --work-dir "work_dirs/$1" --out "$results/$1.json" "${@:2}"
}
choose() { train rates --train-args amp --held-out --schedule 0.5 "$@"; }
report() { train small_sets --train-args amp --rates-from $rates "$@"; }
measure() { run benchmarks/cost.py --out "$results/$1.json" --jobs 3 "${@:2}"; }

wide=e3va+rank4+mixer96
everywhere='swin-nano vit-tiny efficientnet-lite0'
compared=(frozen e3va full mona adapter lora)
all=("${compared[@]}" bitfit normtuning partial adaptformer lorand lst dtl)
merged=(--cfg-options optim_wrapper.constructor=MergedGroupsConstructor)
camvid=configs/camvid/swin-nano_upernet_1xb16-600_camvid-352x480.py
bccd=configs/bccd/retinanet_swin-nano_fpn_1xb8-400_bccd.py
nuclei=configs/nuclei/mask-rcnn_swin-nano_fpn_1xb8-300_nuclei.py

on_tasks() {  # name of the result, options
    measure "$@" --tasks upernet retinanet --sizes l
    measure "$@" --tasks cascade-mask-rcnn --sizes b
}

amp() {  # memory and time of steps under --amp
    on_tasks amp --precisions amp-fp16 --batch-sizes 8 --steps 10 --warmup 3 \
        --methods full full+checkpointed lora mona frozen e3va+bf16 e3va+bf16+taps-float8{,+sampled}
}

fits() {  # the largest batch by the memory of a card
    on_tasks fits --measure fits --precisions amp-fp16 --most-images 16 \
        --methods full lora frozen e3va+bf16 e3va+bf16+taps-float8+sampled
}

gradients() {  # what several processes exchange; AMP keeps parameters and gradients in fp32
    on_tasks gradients --measure gradients --methods full lora e3va
}

# Three rates each, and on BCCD two more seeds for the better two; CamVid's rates are one step higher, since its best was the
# highest of the others' three for every method.
accuracy() {
    local methods=("${all[@]}" e3va+mixer e3va+rank16)
    choose --seeds 0 --datasets bccd nuclei --learning-rates 3e-4 1e-3 3e-3 --methods "${methods[@]}"
    choose --seeds 0 --datasets camvid --learning-rates 1e-3 3e-3 1e-2 --methods "${methods[@]}"
    choose --seeds 1 2 --datasets bccd --rates-from $rates --candidates 2 --methods "${methods[@]}"
    report --methods "${methods[@]}"
}

# At one rate by three seeds, and the better ones in full.
variants() {
    choose --learning-rates 1e-2 --datasets camvid --methods e3va+mixer96{,+kaiming,+rate03} $wide{,+graph1} \
        e3va+rank4+mixer192
    choose --learning-rates 1e-3 --datasets bccd nuclei --methods e3va+mixer96{,+kaiming}+rate3 e3va+mixer96+rate{10,30} \
        $wide{,+graph1}+rate10 e3va+rate10 e3va+rank4+mixer192+rate10
    report --datasets camvid --methods e3va+mixer96 $wide{,+graph1} e3va+rank4+mixer192
    report --datasets bccd nuclei --methods $wide{,+graph1}+rate10 e3va+mixer96+rate10
    report --datasets nuclei --methods e3va+mixer96+rate3
}

seeds() {  # six more of what matters, and folds of BCCD
    more() { train more_seeds --train-args amp --seeds 3 4 5 6 7 8 --rates-from $rates --datasets "$1" --methods "${@:2}"; }
    more bccd "${compared[@]}" e3va+mixer96+rate10 $wide{,+graph1}+rate10
    more camvid frozen e3va full mona adapter $wide{,+graph1}
    more nuclei e3va full mona $wide{,+graph1}+rate10
    folds() { train folds --train-args amp --datasets bccd --held-out --folds 0 1 2 3 4 --learning-rates 1e-3 "$@"; }
    folds --seeds 0 1 2 --methods mona $wide+graph1+rate10
    folds --seeds 0 --methods $wide+{mixrate10,rate10,rate3} $wide+graph1+rate{5,20} $wide+graph2+rate5
}

# The recipe and what it is compared with, on held-out images: at the rates of the sets' configs by three seeds, and at a third
# and about three times these, all by one seed before any has two.
recipe() {
    local own=() around=()
    at() {  # data set, backbones, rate, the others, more methods
        # shellcheck disable=SC2206
        local on=(--and --datasets "$1" --backbones $2) others=(e3va adapter lora full frozen)
        own+=("${on[@]}" --learning-rates "$3" --methods $wide{+ownrate,} "${others[@]}" e3va+taps-float8+sampled "${@:5}")
        around+=("${on[@]}" --learning-rates $4 --seeds SEED --methods $wide+ownrate "${others[@]}")
        [[ $2 != swin-nano* ]] || {
            on+=(--backbones swin-nano)
            own+=("${on[@]}" --learning-rates "$3" --methods mona $wide+graph1+ownrate)
            around+=("${on[@]}" --learning-rates $4 --seeds SEED --methods mona)
        }
    }
    # Where the highest rate of the highway's own decides, also at 0.003.
    at bccd "$everywhere" 3e-4 '1e-3 1e-4' e3va+{taps-float8,sampled}
    at camvid swin-nano 1e-2 '3e-3 3e-2' $wide+rate03
    at camvid 'vit-tiny efficientnet-lite0' 3e-3 '1e-3 1e-2'
    at nuclei "$everywhere" 1e-3 '3e-4 3e-3' $wide+rate3
    train recipe --train-args amp --held-out --schedule 0.5 --seeds 0 1 2 "${own[@]}" "${around[@]/#SEED/0}" \
        "${around[@]/#SEED/1}" --and --datasets bccd --backbones $everywhere --learning-rates 1e-3 --seeds 0 --methods $wide+rate3
}

recommended() {  # on test images
    train recommended --train-args amp --methods $wide+ownrate \
        --and --datasets nuclei camvid bccd \
        --and --datasets camvid bccd --backbones vit-tiny efficientnet-lite0 \
        --and --datasets nuclei --backbones vit-tiny efficientnet-lite0 --methods $wide+ownrate frozen e3va full
}

# In fp32 but for what the options change.
guard() {
    local methods=(e3va e3va+bf16 e3va+bf16+taps-float8{,+sampled})
    train guard --datasets camvid --learning-rates 3e-3 --methods "${methods[@]}"
    train guard --datasets bccd --learning-rates 3e-4 --methods "${methods[@]}"
}

# Frozen layers in 8 and 4 bits, on a backbone that is all linear layers; needs torchao.
quantised_guard() {
    train quantised_guard --train-args amp --backbones vit-tiny --datasets camvid bccd --methods e3va+{bf16,int8,nf4}
}

backbones() { train backbones --train-args amp --backbones vit-tiny efficientnet-lite0 --datasets camvid bccd; }

# In fp32, and fewer at a time: Mask2Former takes up to 10 GB.
heads() {
    JOBS=8 train heads --backbones vit-tiny efficientnet-lite0 --seeds 0 1 \
        --datasets nuclei-mask2former bccd-faster-rcnn camvid-segformer --methods frozen e3va full $wide+ownrate
}

on_set() {  # name of the result, images, config, options
    measure "$1" --tasks --configs "$3" --data real --batch-sizes "$2" --precisions amp-fp16 "${@:4}"
}

cost() {
    local large=(--tasks upernet retinanet --sizes l --steps 5 --warmup 2)
    measure cost_swin "${large[@]}" --batch-sizes 8 --methods full full+checkpointed frozen e3va e3va+bf16 \
        e3va+bf16+taps-float8{,+sampled} e3va+bf16+mixer
    measure cost_swin "${large[@]}" --batch-sizes 2 --methods full frozen e3va+bf16 e3va+bf16+taps-float8
    measure cost_dinov2 --batch-sizes 2 --image-sizes 512x512 896x896 --steps 5 --warmup 2 --tasks \
        --configs configs/ade20k/dinov2-{l,g}_upernet_8xb2-160k_ade20k-512x512.py \
        --methods frozen e3va e3va+bf16 e3va+bf16+taps-float8 lora full
    measure cost_resnet --tasks --configs mmdet::faster_rcnn/faster-rcnn_r{50,101}_fpn_1x_coco --image-sizes 800x1344 \
        --precisions amp-fp16 --batch-sizes 8 --steps 12 --warmup 4 \
        --methods frozen e3va+bf16 full e3va+bf16+taps-float8+sampled
    measure cost_methods --tasks upernet --sizes l --batch-sizes 2 --steps 10 --warmup 3 "${merged[@]}" \
        --methods e3va+bf16 "${all[@]}"
    measure cost_mixers --tasks upernet --sizes l --batch-sizes 2 --steps 10 --warmup 3 "${merged[@]}" --repeats 2 \
        --methods e3va+bf16 e3va+bf16+rank4+mixer96{,+graph1} mona
    measure cost_mixers --tasks retinanet --sizes l --batch-sizes 8 --steps 10 --warmup 3 "${merged[@]}" \
        --methods e3va+bf16 e3va+bf16+rank4+mixer96{,+graph1}
    for set in "16 $camvid" "8 $bccd" "8 $nuclei"; do
        # shellcheck disable=SC2086
        on_set cost_small_sets $set --methods "${all[@]}"
        # shellcheck disable=SC2086
        on_set cost_mixers $set --methods e3va $wide{,+graph1} mona
    done
}

giants() {  # the larger the backbone, the more of the memory is its weights'
    local name=upernet_8xb2-160k_ade20k-512x512.py methods=(e3va+{nf4,int8,bf16} {lora,frozen}+bf16)
    measure fits_giants --precisions amp-fp16 --measure fits --most-images 16 --steps 8 --warmup 3 --tasks \
        --methods "${methods[@]}" \
        --and --configs "configs/ade20k/dinov3-7b_$name" \
        --and --configs "configs/ade20k/dinov2-g_$name" --image-sizes 896x896 --methods "${methods[@]}" full \
        --and --tasks cascade-mask-rcnn --sizes l --methods e3va+bf16{,+taps-float8+sampled} frozen lora full
}

growth() {  # with the size of images, and with that of the backbone; giants has the largest
    local name=upernet_8xb2-160k_ade20k-512x512.py
    grow() {
        measure "$1" --precisions amp-fp16 --batch-sizes 2 --steps 6 --warmup 2 \
            --methods e3va+bf16 full {lora,frozen}+bf16 "${@:2}"
    }
    grow growth_images --tasks upernet --sizes l --configs "configs/ade20k/dinov2-l_$name" --together \
        --image-sizes 512x512 1024x1024 1536x1536 2048x2048
    grow growth_backbones --and --tasks --configs benchmarks/configs/dinov3-{s,b}_$name configs/ade20k/dinov3-l_$name \
        --and --tasks upernet --sizes t s b l
}

demo() {  # not in all: small enough for a CPU, on images that demo/run.py writes
    train demo_rates --datasets demo --held-out --seeds 0 1 \
        --and --learning-rates 1e-3 3e-3 1e-2 --methods $wide+ownrate frozen full \
        --and --learning-rates 3e-3 --backbones vit-tiny --methods e3va $wide+{ownrate,rate2}
    train sgd --datasets demo-sgd --held-out --seeds 0 1 \
        --methods frozen e3va{,+rate3,+rate10,+allsgd} adapter lora full $wide+ownrate
    train taps --held-out --backbones efficientnet-lite0 --methods e3va \
        --and --datasets demo-{branch,block,all}-taps --and --datasets demo --methods frozen e3va
}

operators() {  # not in all: PURE_MMCV is a folder with an mmcv that has no compiled operators; the interpreter's own has
    ln -sfn "$PWD/e3va_mm" "${PURE_MMCV:?}/e3va_mm"
    local packages=(compiled="$PWD" ours="$PURE_MMCV") options=(--steps 20 --warmup 5 --tasks --methods e3va+bf16)
    measure operators --packages "${packages[@]}" "${options[@]}" --precisions amp-fp16 --batch-sizes 8 --data real \
        --configs $bccd $nuclei --repeats 3
    measure operators --packages "${packages[@]}" "${options[@]}" --precisions amp-fp16 --batch-sizes 2 --repeats 3 \
        --configs mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco --image-sizes 800x1344
    measure operators --packages ours="$PURE_MMCV" "${options[@]}" --precisions amp-bf16 --batch-sizes 8 --data real \
        --configs $bccd $nuclei
}

# The first method is the one that the others are compared with; what the bound is about, three times.
steps() {
    local mixers=(e3va $wide{,+graph1}) large=(e3va+bf16 e3va+bf16+rank4+mixer96{,+graph1} mona frozen full)
    in_turn() { measure steps --measure in-turn "$@"; }
    for set in "8 $bccd 40" "16 $camvid 40" "8 $nuclei 25"; do
        read -r images config steps <<<"$set"
        local options=(--tasks --configs "$config" --data real --batch-sizes "$images" --precisions amp-fp16 --steps "$steps")
        in_turn "${options[@]}" --methods "${mixers[@]}" "${all[@]}" e3va+{rank16,mixer,mixer96}
        in_turn "${options[@]}" --methods "${mixers[@]}" mona full --repeats 3
    done
    in_turn --tasks upernet --sizes l --batch-sizes 2 --steps 30 "${merged[@]}" --methods "${large[@]}"
    in_turn --tasks retinanet --sizes l --batch-sizes 8 --steps 12 "${merged[@]}" --methods "${large[@]}"
}

# Ground-truth masks moved at each crop, as in stock, or once; of an image, they are new in each step.
masks() {
    measure masks --measure in-turn --tasks cascade-mask-rcnn --sizes b --precisions amp-fp16 --batch-sizes 8 \
        --steps 20 --warmup 3 --repeats 3 --methods full{,+masks} frozen{,+masks} e3va+bf16{,+masks}
}

shared() {  # many tasks by one frozen pass
    run benchmarks/shared_pass.py --out $results/shared_pass.json --sizes l --image-sizes 512x512 800x1344 --methods e3va+bf16
}

latency() {  # of one image
    local out=$results/latency_gpu.json
    [ $((limit - SECONDS)) -gt 0 ] || { missing=1; return; }
    timeout $((limit - SECONDS)) "$python" benchmarks/latency.py --out $out --rounds 50 --engines torch torch-amp \
        "${commit[@]}" || missing=1
}

several() {  # not in all: two GPUs that train together; BN in the heads does not wait for the other's
    local giant=configs/ade20k/dinov3-7b_upernet_8xb2-160k_ade20k-512x512.py
    local segmentor='--tasks upernet --sizes l' detector='--tasks retinanet --sizes l'
    local cascade='--tasks cascade-mask-rcnn --sizes b --steps 10'
    # shellcheck disable=SC2086
    measure several_gpus --precisions amp-fp16 --gpus 2 --warmup 3 --batch-sizes 4 --steps 15 \
        --and $segmentor --methods {e3va+bf16,full}{+bn,} \
        --and $detector --methods e3va+bf16 full \
        --and $cascade --methods {e3va+bf16,full}+bn \
        --and --tasks --configs $giant --batch-sizes 2 --methods e3va+bf16+bn{,+sharded} \
        --and $segmentor --methods frozen{+bn,} lora+bn \
        --and $detector --methods frozen lora \
        --and $cascade --methods {frozen,lora}+bn
}

parts='amp fits gradients accuracy variants seeds guard quantised_guard backbones heads recipe recommended cost giants growth steps masks shared latency'
for part in ${*:-$parts}; do
    [[ " $parts operators several demo " == *" $part "* ]] || {
        echo "unknown part $part; known are $parts operators several demo" >&2
        exit 2
    }
    "$part"
done
[ $missing = 0 ] && echo 'results are complete' || { echo 'results are not complete: run this again'; exit 1; }
