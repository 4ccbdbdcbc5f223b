"""Find the axis that binds a run, Data, Algorithm or Machine, by experiment."""
