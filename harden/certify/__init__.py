"""The certificate: exact scans of many neurons, and a bound on what they missed."""
