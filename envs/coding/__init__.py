"""Coding: functions, contests, bugs and repositories, judged in sandboxes."""
