"""The laws of the library that hold on random programs: what each check is, and on which programs it is tried."""

from tests.support.program_laws.table import LAWS, Law

__all__ = ["LAWS", "Law"]
