"""The schema of `report_run`."""

from kasa_tune.config.entries import FilePath, Key, Schema

REPORT: Schema = {
    "run": Key(FilePath | None, None, help="a run's `output_dir`; its plots are written there"),
    "runs": Key(
        dict[str, FilePath] | list[FilePath] | None,
        None,
        help="several runs side by side instead: names of your choice, each with an `output_dir`, "
        "or a list of folders",
    ),
    "output_dir": Key(
        FilePath | None, None, help="folder of `report.html`; null: the folder of the (first) run"
    ),
    "checkpoint_dir": Key(
        FilePath | None,
        None,
        help="folder of the base model's files; null: where the runs read them",
    ),
    "calibrate": Key(
        bool,
        False,
        help="run the calibration of the run again for a few layers, and show the covariances of "
        "their inputs and the spectra of W, ASVD and CO-SVD; it loads the whole base",
    ),
}
