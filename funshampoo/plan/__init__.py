"""`funshampoo.plan(...)` is a function, and `python -m funshampoo.plan` a program.

It is a package, not a module, so that both work: the package `funshampoo` imports it and then binds
its own name `plan` to the function, and `python -m` runs `__main__` inside it, which nothing has
imported before.
"""

from funshampoo.plan.planner import Plan, RankPlan, StackPlan, plan
from funshampoo.plan.sharding import ShardingPlan, plan_sharded

__all__ = ["Plan", "RankPlan", "ShardingPlan", "StackPlan", "plan", "plan_sharded"]
