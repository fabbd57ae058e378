"""The method, in torch alone: adapters, what is kept for their gradient, mixers, and the way from stage to stage."""
