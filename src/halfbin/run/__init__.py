"""One run from a plan to its result: carrying it out, and the report that tells what it cost."""
