"""Plans: memory, time, traffic, cost and failures of a model on hardware, from first principles.

Start with quantity: every figure is a Quantity, which carries its unit and the way it was computed.
"""
