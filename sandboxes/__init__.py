"""Run what nobody trusts: expressions and code that a policy wrote."""
