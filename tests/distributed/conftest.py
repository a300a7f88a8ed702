from tests.distributed.ranks import ranks

__all__ = ["ranks"]
