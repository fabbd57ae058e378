#!/usr/bin/env bash
# Runs what is missing in results/ on one GPU, what is wanted most first. What is in the files already is not repeated.
#
# usage: tools/reproduce.sh [SECONDS]
#   SECONDS  nothing is started after them, and what then still runs is stopped (default: no limit)
# PYTHON     interpreter (default: .venv/bin/python)
# JOBS       trainings at a time (default: 12, which keeps 16 cores busy). Processes take turns on a GPU, launch gaps
#            included, unless CUDA MPS serves them (nvidia-cuda-mps-control -d): on an H200, a step of the nuclei's
#            Mask R-CNN took 2.3 s beside 11 like it without MPS (rates.json), 0.6 s beside 11 others with it (small_sets.json).
# COMMIT     recorded in the results (default: asked of git)
# data/camvid, data/bccd, data/nuclei and data/weights have to be there.
set -uo pipefail
cd "$(dirname "$0")/.."

limit=${1:-1000000}
python=${PYTHON:-.venv/bin/python}
commit=(${COMMIT:+--commit "$COMMIT"})
missing=0
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}  # also without `pip install -e .`

run() {  # tool and arguments
    local left=$((limit - SECONDS))
    [ "$left" -gt 0 ] || { missing=1; return; }
    timeout --kill-after 2 "$left" "$python" "$@" "${commit[@]}" --time-limit $((left > 30 ? left - 15 : left)) || missing=1
}

train() { run tools/run_grid.py --jobs "${JOBS:-12}" --cfg-options train_dataloader.num_workers=2 val_dataloader.num_workers=2 "$@"; }
measure() { run tools/benchmark.py --jobs 3 --steps 5 --warmup 2 "$@"; }
rates() { train --train-args amp --held-out --schedule 0.5 --work-dir work_dirs/rates --out results/rates.json "$@"; }

# All methods on the small sets: those that E3VA is to be level with come first. Three rates each, and on BCCD two more
# seeds for the better two; CamVid's rates are one step higher, since its best was the highest of the others' three for
# every method.
compared='frozen e3va full mona adapter lora e3va+mixer e3va+mixer48x2 e3va+mixer48+every2'
compared+=' e3va+mixer48x2+rate3 e3va+mixer48+every2+rate3 e3va+mixer48x2+feedback+rate3 e3va+mixer48+every2+feedback'
others='bitfit normtuning partial adaptformer lorand lst dtl'
adapters='e3va+mixing3 e3va+pca e3va+rank16'
for methods in "$compared" "$others" "$adapters"; do
    # shellcheck disable=SC2086
    rates --seeds 0 --datasets bccd nuclei --learning-rates 3e-4 1e-3 3e-3 --methods $methods
    # shellcheck disable=SC2086
    rates --seeds 0 --datasets camvid --learning-rates 1e-3 3e-3 1e-2 --methods $methods
    # shellcheck disable=SC2086
    rates --seeds 1 2 --datasets bccd --rates-from results/rates.json --candidates 2 --methods $methods
    # shellcheck disable=SC2086
    train --train-args amp --rates-from results/rates.json --out results/small_sets.json --methods $methods
done

# Variants compared at one rate by three seeds, and the better ones in full.
explore() {  # rate, data sets (one word), variants
    local variants=("${@:3}")
    # shellcheck disable=SC2086
    rates --learning-rates "$1" --datasets $2 --methods "${variants[@]/#/e3va+}"
}
best() {  # data set, variants
    local variants=("${@:2}")
    train --train-args amp --rates-from results/rates.json --out results/small_sets.json --datasets "$1" \
        --methods "${variants[@]/#/e3va+}"
}
variants=(mixer96 mixer64+every2 rank4+mixer96+every2 mixer48x2 mixer48+every2 mixer96+kaiming)
detectors=(rank4+mixer96 rank4+mixer96x2 mixer48x2 mixer96)
explore 1e-2 camvid "${variants[@]}" mixer96+rate03 rank4+mixer96 rank4+mixer192 rank4+mixer96+graph1
explore 1e-3 'bccd nuclei' "${variants[@]/%/+rate3}" "${detectors[@]/%/+rate10}" rate10 rank4+mixer192+rate10 \
    mixer64+every2+rate10 mixer96+rate30 rank4+mixer96+graph1+rate10
best camvid rank4+mixer96+every2 mixer64+every2 mixer96 rank4+mixer96 rank4+mixer192 rank4+mixer96+graph1
detectors+=(rank4+mixer96+graph1)
best bccd "${detectors[@]/%/+rate10}" mixer64+every2+rate3 mixer48+every2+feedback+rate3
best nuclei "${detectors[@]/%/+rate10}" mixer96+rate3

# Six more seeds of what matters for the gap, and folds of the training images of BCCD, whose seeds differ most.
wide=e3va+rank4+mixer96
more() {  # data set, methods
    train --train-args amp --datasets "$1" --seeds 3 4 5 6 7 8 --rates-from results/rates.json --work-dir work_dirs/more_seeds \
        --out results/more_seeds.json --methods "${@:2}"
}
more bccd frozen e3va full mona adapter lora e3va+mixer96+rate10 e3va+mixer48x2+rate10 $wide+rate10 $wide+graph1+rate10
more camvid mona $wide+graph1 $wide+every2 $wide full e3va adapter frozen
more nuclei mona $wide+graph1+rate10 $wide+rate10
train --train-args amp --datasets bccd --seeds 0 --held-out --folds 0 1 2 3 4 --learning-rates 1e-3 --work-dir work_dirs/folds \
    --out results/folds.json --methods mona $wide+{feedback+rate10,mixrate10,rate10,rate3} $wide+graph{1,2}+rate{3,10}

# What the fast options do to accuracy, in fp32 but for what they change.
guard() { train --work-dir work_dirs/guard --out results/guard.json --methods e3va e3va+bf16 e3va+bf16+taps-float8 \
    e3va+bf16+taps-float8+sampled "$@"; }
guard --datasets camvid --learning-rates 3e-3
guard --datasets bccd --learning-rates 3e-4

# Memory and time.
gpu=results/benchmark_gpu.json
for task in upernet retinanet cascade-mask-rcnn; do
    tasks=(--tasks $task --sizes "$([ $task = cascade-mask-rcnn ] && echo b || echo l)")
    measure --out $gpu --profile --batch-sizes 8 "${tasks[@]}" --methods full full+checkpointed frozen e3va e3va+bf16 \
        e3va+bf16+taps-float8 e3va+bf16+taps-float8+sampled e3va+bf16+mixer
    measure --out $gpu --batch-sizes 2 "${tasks[@]}" --methods full frozen e3va+bf16 e3va+bf16+taps-float8
    measure --out $gpu --precisions amp-fp16 --batch-sizes 8 "${tasks[@]}" --methods full frozen e3va+fp16 e3va+fp16+taps-float8
done
capped() {  # images, GiB
    local case=(--batch-sizes "$1" --memory-cap "$2" --tasks cascade-mask-rcnn --sizes l)
    measure --out $gpu "${case[@]}" --methods frozen e3va+bf16+taps-float8
    measure --out $gpu "${case[@]}" --precisions amp-fp16 --methods frozen e3va+fp16+taps-float8
}
capped 1 3
capped 2 4.5
compiled=results/benchmark_compiled.json
measure --out $compiled --batch-sizes 8 --precisions amp-fp16 --profile --tasks upernet retinanet --sizes l \
    --methods frozen e3va+fp16 e3va+fp16+compiled
measure --out $compiled --batch-sizes 2 --tasks upernet --sizes l --methods frozen e3va+bf16 e3va+bf16+compiled

# Other backbones on the small sets, at the configs' rates.
train --train-args amp --work-dir work_dirs/backbones --out results/backbones.json \
    --backbones vit-tiny efficientnet-lite0 --datasets camvid bccd

# Plain ViTs.
ade=configs/ade20k/dinov2
measure --out results/benchmark_dinov2.json --batch-sizes 2 --image-sizes 512x512 896x896 --tasks \
    --configs ${ade}-l_upernet_8xb2-160k_ade20k-512x512.py ${ade}-g_upernet_8xb2-160k_ade20k-512x512.py \
    --methods frozen e3va e3va+bf16 e3va+bf16+taps-float8 lora full

# What all methods cost.
costing="frozen e3va full mona adapter lora $others"
merged=(--cfg-options optim_wrapper.constructor=MergedGroupsConstructor)
on_swin_l() {  # file, task, images, options
    measure --out "results/$1.json" --tasks "$2" --sizes l --batch-sizes "$3" --steps 10 --warmup 3 "${merged[@]}" "${@:4}"
}
# shellcheck disable=SC2086
on_swin_l benchmark_methods upernet 2 --methods e3va+bf16 $costing
alone() {  # file, images, config, options
    measure --out "results/$1.json" --tasks --configs "$3" --data real --batch-sizes "$2" \
        --precisions amp-fp16 --steps 20 --warmup 5 "${@:4}"
}
camvid=configs/camvid/swin-nano_upernet_1xb16-600_camvid-352x480.py
bccd=configs/bccd/retinanet_swin-nano_fpn_1xb8-400_bccd.py
nuclei=configs/nuclei/mask-rcnn_swin-nano_fpn_1xb8-300_nuclei.py
for set in "16 $camvid" "8 $bccd" "8 $nuclei"; do
    # shellcheck disable=SC2086
    alone benchmark_small_sets $set --methods $costing
done
on_swin_l benchmark_mixers upernet 2 --repeats 2 --profile --methods e3va+bf16 \
    e3va+bf16+rank4+mixer96{,+graph1,+every6} e3va+bf16+mixer48x2 mona
on_swin_l benchmark_mixers retinanet 8 --profile --methods e3va+bf16 e3va+bf16+rank4+mixer96{,+graph1}
mixers() { alone benchmark_mixers "$1" "$2" --profile --methods e3va $wide{,+graph1} "${@:3}" mona; }
mixers 16 "$camvid" $wide+every2
mixers 8 "$bccd" ${wide}x2 e3va+mixer48x2
mixers 8 "$nuclei" ${wide}x2 e3va+mixer48x2

# Steps in turn; the first method is the one that the others are compared with.
steps() { run tools/benchmark_steps.py --out results/steps.json "$@"; }
in_turn() {  # images, config, steps, more methods
    steps --tasks --configs "$2" --data real --batch-sizes "$1" --precisions amp-fp16 --steps "$3" \
        --methods e3va $wide{,+graph1} "${@:4}"
}
# shellcheck disable=SC2206
every=($costing e3va+{pca,mixing3,rank16,mixer,mixer96,mixer48x2,mixer48+every2,mixer48+every2+feedback})
in_turn 8 "$bccd" 40 "${every[@]}" e3va+mixer64+every2 e3va+mixer48x2+feedback ${wide}x2
in_turn 16 "$camvid" 40 "${every[@]}" $wide+every2 e3va+mixer64+every2 e3va+rank4+mixer192
in_turn 8 "$nuclei" 25 "${every[@]}" e3va+mixer48x2+feedback ${wide}x2
# What the bound is about, three times.
in_turn 8 "$bccd" 40 mona full --repeats 3
in_turn 16 "$camvid" 40 $wide+every2 mona full --repeats 3
in_turn 8 "$nuclei" 25 mona full --repeats 3
large=(e3va+bf16 e3va+bf16+rank4+mixer96{,+graph1} mona frozen full)
steps --tasks upernet --sizes l --batch-sizes 2 --steps 30 "${merged[@]}" --methods "${large[@]}"
steps --tasks retinanet --sizes l --batch-sizes 8 --steps 12 "${merged[@]}" --methods "${large[@]}"
alone benchmark_groups 8 $bccd --cfg-options optim_wrapper.constructor=DefaultOptimWrapperConstructor \
    --methods e3va e3va+mixer48x2 mona full

[ $missing = 0 ] && echo 'results/ is complete' || { echo 'results/ is not complete: run this again'; exit 1; }
