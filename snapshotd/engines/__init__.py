"""Engines that run under an interpreter of their own: their environments, and how those are installed."""
