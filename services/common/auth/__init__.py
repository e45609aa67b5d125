"""Who calls, and what they may: TLS, tokens, the permission table, tenants, limits, the audit record."""
