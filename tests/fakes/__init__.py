"""Ports in memory, shared by every kind of test. Contract suites hold them to what the real ones do."""
