"""Training and inference by several processes: layouts, the balance of experts over GPUs, schedules of a pipeline."""
