"""Files that others wrote, into records: model configs, the shipped catalogues, traces, load-generator results."""
