"""Readers for a user's own ranking data."""

from .ranking_tables import RankingTables, fingerprint

__all__ = ["RankingTables", "fingerprint"]
