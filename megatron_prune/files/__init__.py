"""Files, whatever they hold: documents read with care, outputs that appear whole or not at all, positioned reads and writes."""
