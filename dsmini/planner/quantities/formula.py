"""Formulas of figures: walk through what a quantity was computed from, compute it again, differentiate it.

A quantity holds its own formula, so none of these can differ from what was computed. For

    cache = layers * (latent + rope) * number

evaluate(cache, {"latent": 1024}) is the cache of another latent, and gradient(cache)["latent"] is layers * number.
"""

from collections.abc import Iterator, Mapping

from dsmini.planner.quantities.quantity import RULES, Anything


def walk(*figures: Anything) -> Iterator[Anything]:
    """Yield figures and all that they were computed from, each once, what is needed first."""
    done: set[int] = set()
    open_ = list(reversed(figures))
    while open_:
        node = open_[-1]
        needed = [arg for arg in node.args if id(arg) not in done] if id(node) not in done else []
        if needed:
            open_ += reversed(needed)
            continue
        open_.pop()
        if id(node) not in done:
            done.add(id(node))
            yield node


def inputs(figure: Anything) -> dict[str, Anything]:
    """Return the inputs of a figure by name, in the order of their use."""
    return {node.name: node for node in walk(figure) if node.op == "input"}


def evaluate(figure: Anything, changed: Mapping[str, float]) -> float:
    """Return the value that a figure's formula has with other values of some inputs."""
    values: dict[int, float] = {}
    for node in walk(figure):
        if node.op in RULES:
            values[id(node)] = RULES[node.op][0](*(values[id(a)] for a in node.args))
        else:
            values[id(node)] = changed.get(node.name, node.value) if node.name else node.value
    return values[id(figure)]


def gradient(figure: Anything) -> dict[str, float]:
    """Return the derivative of a figure with respect to each of its inputs; a rounding counts as constant."""
    nodes = list(walk(figure))
    slopes = dict.fromkeys(map(id, nodes), 0.0)
    slopes[id(figure)] = 1.0
    found: dict[str, float] = {}
    for node in reversed(nodes):
        if node.op == "input":
            found[node.name] = found.get(node.name, 0.0) + slopes[id(node)]
        elif node.op in RULES:
            partial = RULES[node.op][1]([a.value for a in node.args], node.value)
            for arg, slope in zip(node.args, partial, strict=True):
                slopes[id(arg)] += slope * slopes[id(node)]
    return found
