"""What `plan` prints for a person: memory as bars, what a step computes and sends, its time and what that is made of, changes that fit."""

BAR = 32  # characters of a whole card
KINDS = {
    "frozen": "frozen weights",
    "trainable": "weights that train",
    "optimizer": "optimizer",
    "gradients": "accumulated gradients",
    "activations_and_temporary": "activations, temporary",
}
PARTS = {
    "gemms": "GEMMs", "attention": "attention", "between_gemms": "between GEMMs", "communication_exposed": "communication", "update": "update",
    "communication_hidden": "communication behind them",
}  # fmt: skip


def print_plan(found: dict) -> None:
    proof = f"compiled for it in {found['compile_seconds']} s, no GPU needed" if found["compiled"] else "ESTIMATED by formulas: nothing was compiled"
    print(f"\n{found['num_devices']} x {found['device']}, {mesh_name(found['mesh'])}: {proof}; nothing was timed\n")
    shape, batches = found["batch_shape"], found["micro_batches"]
    records = f"{found['global_batch_size']} records a step: {batches} micro-batch{'es' * (batches != 1)} of {found['micro_batch_size']} on each data shard"
    print(f"batch         {records}; T {shape['tokens']}, K {shape['supervised']}, N {shape['media']}")
    if found["padding_share"] is not None:
        print(f"data          {found['num_records']:,} records, {found['padding_share']:.1%} of text positions are padding")
    _print_memory(found)
    _print_work(found)
    _print_time(found)
    for note in found["notes"]:
        print(f"note: {note}")
    if not found["fits"]:
        _print_suggestions(found)


def mesh_name(mesh: dict[str, int]) -> str:
    """{"data": 2, "fsdp": 4, ...} -> "data 2 x fsdp 4"."""
    return " x ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1) or "one GPU"


def _print_memory(found: dict) -> None:
    memory = found["memory_gib"]
    print("\nGiB a GPU")
    for kind, name in KINDS.items():
        print(f"  {name:<24}{memory[kind]:>7.2f}  {'█' * round(BAR * min(1.0, memory[kind] / memory['device']))}")
    verdict = "fits" if found["fits"] else "DOES NOT FIT"
    print(f"  {'total':<24}{memory['total']:>7.2f}  of {memory['device']} ({found['usable_gib']} of them usable): {verdict}\n")


def _print_work(found: dict) -> None:
    counts, needed = found["gemms_per_layer"], found["gemms_per_layer_needed"]
    kinds = ", ".join(f"{count:g} {precision}" for precision, count in counts.items() if count)
    again = sum(counts.values()) - needed
    print(f"layer         {kinds} GEMMs; {needed} are needed" + (f", {again:g} are computed again to save memory" if again > 0 else ", none is computed twice"))
    if found["adapter_gemms_per_layer"]:
        print(f"adapters      {found['adapter_gemms_per_layer']:g} small GEMMs a layer, to and from the rank, in the compute dtype")
    if found["has_logits_tensor"]:
        print("logits        a tensor of rows x T x vocabulary exists: memory that chunks would save")
    for row in found["collectives"]:
        if row["bytes"] >= 1e6:
            place = "in layers" if row["in_layers"] else "outside"
            print(f"sent          {row['bytes'] / 1e9:9.2f} GB  {row['op']} over {row['axis']}, {row['count']} a step, {place}")


def _print_time(found: dict) -> None:
    print(f"FLOPs         {found['flops_per_sample'] / 1e12:.4g} T a sample, {found['flops_per_step'] / 1e15:.4g} P a step")
    print(f"step          {found['step_time_s']:.4g} s expected by formula, {found['ideal_step_time_s']:.4g} s at the datasheet's peak")
    parts = {part: f"{name} {1e3 * found['step_time_parts_s'][part]:.4g}" for part, name in PARTS.items()}
    waits = f"{1 + found['step_time_bubble']:.4g} (stages wait) x " * bool(found["step_time_bubble"])
    compute = f"max({parts['gemms']} + {parts['attention']} + {parts['between_gemms']}, {parts['communication_hidden']})"
    means = "" if found["padding_share"] is None else ", of the largest batch shape"
    print(f"formula       {waits}({compute} + {parts['communication_exposed']}) + {parts['update']} ms{means}; training/step_time.py")
    speed, share = found["samples_per_second_per_gpu"], found["model_flops_utilization"]
    print(f"speed         {speed:.1f} samples/s/GPU, {share:.0%} of the bf16 peak")
    if found["days_for_max_steps"] is not None:
        print(f"run           {duration(found['days_for_max_steps'])} for trainer.max_steps")
    if found["days_for_dataset"] is not None:
        print(f"epoch         {duration(found['days_for_dataset'])}")


def duration(days: float) -> str:
    return f"{days:.1f} days" if days >= 2 else f"{24 * days:.1f} hours" if days >= 1 / 24 else f"{24 * 60 * days:.0f} minutes"


def _print_suggestions(found: dict) -> None:
    fitting = "what fits, each compiled" if found["compiled"] else "what fits, by estimate"
    print(f"\n{fitting if found['suggestions'] else 'no change was found that fits; take more GPUs'}")
    for trial in found["suggestions"]:
        print(f"  {trial['memory_gib']['total']:6.2f} GiB {trial['samples_per_second_per_gpu']:7.1f} samples/s/GPU  {as_flags(trial['changes'])}")


def as_flags(changes: dict) -> str:
    return " ".join(f"--config.{path}={value}" for path, value in changes.items())


def print_sweep(found: dict) -> None:
    first = found["sweep"][0]
    print(f"\n{found['num_devices']} x {found['device']}, {'compiled' if first['compiled'] else 'ESTIMATED'}; speed by formula, nothing was timed\n")
    print(f"{'mesh':<28}{'micro-batch':>12}{'GiB a GPU':>11}{'':>4}{'samples/s/GPU':>14}")
    best = max((row["samples_per_second_per_gpu"] for row in found["sweep"] if row["fits"]), default=None)
    for row in found["sweep"]:
        speed, fits = row["samples_per_second_per_gpu"], row["fits"]
        mark = "  <- fastest that fits" if fits and speed == best else ""
        print(f"{mesh_name(row['mesh']):<28}{row['micro_batch_size']:>12}{row['memory_gib']['total']:>11.2f}{'' if fits else ' no':>4}{speed:>14.1f}{mark}")
    for note in found["notes"]:
        print(f"note: {note}")
