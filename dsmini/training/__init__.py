"""A training run: how it starts, its steps, its optimizers and schedules, and what people see of it."""
