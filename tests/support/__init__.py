"""Fixtures and cases that several test files share."""
