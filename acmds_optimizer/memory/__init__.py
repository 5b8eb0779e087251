"""The only room that reads or caps device memory."""
