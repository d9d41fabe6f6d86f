"""Model -> model, by path pattern: what trains (`select`); later LoRA and FP8. A feature is a function on the model, never a flag in a layer."""
