"""Our own checkpoints: what trains and how far it got (`manager`), and the frozen weights a run stands on (`base`). Orbax reads and writes."""
