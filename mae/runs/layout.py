"""Names of the files and folders in a run's directory, and the number of their format. Imports no torch."""

FORMAT = 1  # of config.yaml and of a checkpoint's manifest: see `mae.config.versions`
FORMAT_KEY = "format"  # absent in what earlier versions wrote, which counts as 0

CONFIG = "config.yaml"  # checked and resolved, with absolute paths
OVERRIDES = "overrides.yaml"  # the command line
TYPED_PATHS = "paths.yaml"  # paths that were typed relative
METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
ENVIRONMENT = "environment.jsonl"  # a line each time the run was started
SUMMARY = "summary.json"  # there once the run is finished
FAILURE = "failure.json"  # the first error of the last start
OUTPUTS = "outputs.jsonl"  # files that the run wrote to `task.path`: see `mae.runs.outputs`
LOG = "log.txt"
REPORT = "report.html"
CHECKPOINTS = "checkpoints"
CLASSES = "classes.json"  # of a classifier: names in the order of its logits
LAYERS_CSV = "layers.csv"  # of a probe of several layers
BAD_STEP = "bad_step"  # the first step that was not finite, and its replay: see `mae.runs.bad_step`
SLURM = "slurm"  # jobs, attempts and their verdicts
SWEEP_RECORD = "multirun.yaml"  # beside the members of a sweep: Hydra's record of it
