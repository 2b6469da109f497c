"""Programs that measure, and the import of real data: none of them runs in the tests but for a moment."""
