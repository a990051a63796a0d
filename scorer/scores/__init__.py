"""Every formula: from NLL sums to measures, from turns to records, from a share to an exact number."""
