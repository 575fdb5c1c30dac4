"""Golden records: what one installed version of qcore writes and prints, and how two compare.

`record` runs the fixed commands of `cases` and `error_cases` on the files of `inputs`, `compare`
compares two records, `shapes` derives from a record the contract of ``--json`` in
``shapes.json``. ``sentences.json`` lists what may differ between versions. No file here imports
qcore, so one checkout records any version.
"""
