"""The result of a search, as text for users."""

from __future__ import annotations

from ..lora.formats.searched import written
from .session import Order, Outcome

NEAR_THE_EDGE = 0.01
NEARLY = 0.05  # tolerance for a share, because the search used other prompts


def report(outcome: Outcome, order: Order) -> str:
    """What was found, how sure it is, and what to do if it cannot be trusted."""
    found = outcome.found
    lines = [written(order.names, outcome.weights), ""]
    lines.append(_verdict(outcome))
    if outcome.shown is not None:
        default, result = (f"{100 * share:.0f} %" for share in outcome.shown)
        lines.append(f"{result} of the style's full effect shows; {default} at the default.")
        if outcome.shown[1] < order.shown - NEARLY:
            lines.append(
                f"You set style_at_least to {100 * order.shown:.0f} %, but no measured weights "
                "show that much. Widen the range, or use more steps."
            )
    elif not found.stopped:
        lines.append("Even in many steps the style has no effect, so its share cannot be measured.")
    tied = {i for pair in found.tied for i in pair}
    lines += ["", f"Equally good, measured {len(found.points)} times:"]
    for number, (name, (least, most)) in enumerate(
        zip(order.names, found.region.ranges(), strict=True)
    ):
        text = f"  {name}: {least:.2f} to {most:.2f}"
        if number in tied:
            text += ", but only together with another weight (see below)"
        elif most - least > 0.9 * (order.high - order.low):
            text += ": it makes no difference"
        lines.append(text)
    for i, j in found.tied:
        total = found.region.centre[i] + found.region.centre[j]
        lines.append(
            f"  {order.names[i]} and {order.names[j]}: only their sum matters, {total:.2f}"
        )
    for name, weight in zip(order.names, found.best.weights, strict=True):
        if min(weight - order.low, order.high - weight) < NEAR_THE_EDGE:
            lines.append(f"The best weight of {name} is at the end of its range: widen the range.")
    best = found.best  # its distances are relative to the default
    lines += [
        "",
        f"At the best weights measured, the distance to the reference is {best.d_path:.3f} of the "
        f"default's along its path, and {best.d_spec:.3f} in the spectrum.",
    ]
    return "\n".join(lines)


def _verdict(outcome: Outcome) -> str:
    if outcome.found.stopped and outcome.held_out is None:
        return "Interrupted: these are the best weights so far, not checked on held-out pictures."
    if outcome.held_out is None:
        return "The default is as good as any other weights."
    percent = 100 * (1 - outcome.held_out / 2)
    if percent < 0 and not outcome.is_default:
        return (
            "The default shows less of the style than style_at_least. On held-out prompts, these "
            f"weights are {-percent:.1f} % farther from the reference than the default."
        )
    if outcome.is_default:
        return (
            f"The default is kept, because on held-out prompts the weights that the search found "
            f"are {-percent:.1f} % worse."
        )
    return f"On held-out prompts these weights are {percent:.1f} % nearer to the reference."
