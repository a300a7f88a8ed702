"""Whole models: the roles of their parameters, and a method for each role."""

from funshampoo.models.front_door import METHOD_ROLES, for_model
from funshampoo.models.kinds import ROLES
from funshampoo.models.roles import roles
from funshampoo.models.table import RoutingTable, routing_table

__all__ = ["METHOD_ROLES", "ROLES", "RoutingTable", "for_model", "roles", "routing_table"]
