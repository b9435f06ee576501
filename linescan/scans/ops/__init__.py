"""One file per recurrence, or family of them: public function, layout, definition and chunked form.

`linescan.scans` exports the functions; `linescan.scans.recurrences()` lists the implementations of each.
"""
