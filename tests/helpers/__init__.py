"""Servers, processes, models and damage that tests of several folders use."""
