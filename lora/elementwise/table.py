"""All rules, by their names."""

from .dare import DARE
from .della import DELLA
from .magnitude import MAGNITUDE
from .rule import Rule
from .ties import TIES

RULES: dict[str, Rule] = {rule.name: rule for rule in (TIES, DARE, DELLA, MAGNITUDE)}
