"""The embedded data set, drawn once per session, with short lists beside its own."""

import shutil
from pathlib import Path

import pytest

DRAWS = "the first step of a process takes other dropout: the DataLoader draws its seed after seed_torch (gta_seg.py)"
DEFECTS = {  # part of a test's name -> what the product does; take the line out when it is mended (strict: it tells)
    "test_stopped_and_resumed_is_bit_equal": DRAWS,
    "test_a_signal_saves_and_leaves_with_a_message_and_code_0": DRAWS,
    "test_killed_at_random_moments": DRAWS,
    "test_twenty_kills": DRAWS,
    "test_killed_at_a_chosen_moment_and_resumed_is_bit_equal[in warm-up]": DRAWS,
    "test_killed_at_a_chosen_moment_and_resumed_is_bit_equal[after the": DRAWS,
    "test_killed_at_a_chosen_moment_and_resumed_is_bit_equal[in a save": DRAWS,
    "test_killed_at_a_chosen_moment_and_resumed_is_bit_equal[between": DRAWS,
    "test_log_is_cut_back_to_the_checkpoint_and_torn_lines_go": DRAWS,
    "test_resume_with_other_bookkeeping_goes_on": DRAWS,
    "test_resume_on_two_processes_is_bit_equal": DRAWS,
    "test_an_image_that_one_process_cannot_score": "the other processes leave with gloo's traceback",
    "test_skipped_images_of_all_processes_are_counted": "Run.skipped is process 0's own count",
    "test_ctrl_c_before_the_first_step": "KeyboardInterrupt is not caught by runs.cli: a traceback",
    "test_a_kill_leaves_no_litter_for_ever": ".last.pt.PID.tmp of a killed process is never removed",
    "test_resume_after_a_kill_before_the_first_save_says": "--resume without last.pt starts afresh and says nothing",
    "test_folder_that_was_moved_can_be_resumed": "`out` itself is compared among the settings (FREE_TO_CHANGE)",
    "test_predict_keeps_pictures_of_one_name_apart": "a/1.png and b/1.png are written to one file, silently",
    "test_the_root_of_shapes_is_a_file": "data.shapes.once: mkdir raises FileExistsError",
    "test_negative_split_seed": "find.choose: splits.draw is outside the try, SplitError becomes a traceback",
    "test_classes_txt_that_is_no_text": "find.read_classes: UnicodeDecodeError",
    "test_the_count_of_skipped_images_goes_on": "Run.skipped starts at 0 again after --resume",
    "test_tiny_unlabeled_images_are_trained_on[size1]": "transforms.resize to 1x1 pixels: an INTERNAL ASSERT of torch",
    "test_batch_that_does_not_divide[0]": "train divides by batch_size before check: ZeroDivisionError",
    "test_setting_out_of_range[drop=1.0]": "drop 1 is accepted and keeps nothing",
    "test_setting_out_of_range[aspp_rates=(0,": "a dilation of 0 is a RuntimeError of torch",
    "test_setting_out_of_range[steps=0": "no steps at all: KeyError in finish",
    "test_flag_without_a_meaning_is_refused[method=suponly warmup": "--warmup-epochs is ignored by suponly",
    "test_flag_without_a_meaning_is_refused[threshold": "--drop is ignored beside --threshold",
    "test_flag_without_a_meaning_is_refused[transfer": "--alpha-gta is ignored by --transfer none",
    "test_unknown_backbone[{'weights': 'shapes'}]": "shapes.pretrain asks timm before backbones.build checks the name",
    "test_backbone_that_cannot_be_cut[alexnet]": "fewer than three stages: IndexError in gta_seg.Backbone",
    "test_backbone_that_cannot_be_cut[mixer": "timm has no features_only for it: TypeError",
    "test_backbone_that_cannot_be_cut[vgg11]": "timm asserts output_stride == 32: AssertionError",
    "test_file_that_holds_no_weights_for_this_network[list": "read_weights: AttributeError for what is no dict",
    "test_file_that_holds_no_weights_for_this_network[tensor": "read_weights: AttributeError for what is no dict",
    "test_device_that_does_not_exist": "distributed.start takes any word: RuntimeError",
    "test_out_is_not_writable[exists]": "Run.__init__: PermissionError for log.jsonl",
    "test_over_quota_is_a_sentence_too": "user_sentence knows ENOSPC, not EDQUOT",
    "test_checkpoint_that_stays_after_a_loss": "weights that are not finite are saved while the loss still is",
    "test_eval_with_another_network": "load_state_dict's RuntimeError comes through",
    "test_a_draw_takes_images_that_have_labels": "random: draws open every label of images/train, also missing ones",
}


def pytest_collection_modifyitems(items) -> None:
    for item in items:
        for part, reason in DEFECTS.items():
            if part in item.nodeid and item.path.name in ("test_runs.py", "test_errors.py", "test_processes.py"):
                item.add_marker(pytest.mark.xfail(strict=True, reason=reason))


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory) -> Path:
    """A root for --dataset shapes. `few` (7 images) can be scored with --val; unlabeled.txt lists 8 images."""
    from data import shapes
    root = tmp_path_factory.mktemp("shapes")
    voc = shapes.make_voc(root / "voc")
    lists = voc / "ImageSets" / "Segmentation"
    (lists / "few.txt").write_text("".join((lists / "val.txt").read_text().splitlines(keepends=True)[:7]))
    train = (lists / "train.txt").read_text().splitlines(keepends=True)
    (root / "unlabeled.txt").write_text("".join(train[100:108]))
    (root / "labeled.txt").write_text("".join(train[:8]))
    return root


@pytest.fixture(scope="session")
def tiny(shapes_root):
    """tiny(out=..., steps=...) -> a command line on a few shapes: two steps to an epoch, two of them warm-up."""
    import helpers

    def line(**flags) -> list[str]:
        return helpers.argv(**{"dataset": "shapes", "root": shapes_root, "val": "few", "steps": 8,
                               "split": shapes_root / "labeled.txt", "unlabeled": shapes_root / "unlabeled.txt",
                               **helpers.TINY, "log_every": 1, **flags})
    return line


@pytest.fixture
def folder_root(shapes_root, tmp_path) -> Path:
    """A root for --dataset folder that a test may break: 8 training, 3 scored and 4 unlabeled images of shapes."""
    voc, root = shapes_root / "voc", tmp_path / "folder"
    for part, names in {"train": range(8), "val": range(3), "unlabeled": range(100, 104)}.items():
        (root / "images" / part).mkdir(parents=True)
        (root / "labels" / part).mkdir(parents=True)
        for i in names:
            name = f"{'val' if part == 'val' else 'train'}_{i:06d}"
            shutil.copy(voc / "JPEGImages" / f"{name}.jpg", root / "images" / part)
            if part != "unlabeled":
                shutil.copy(voc / "SegmentationClass" / f"{name}.png", root / "labels" / part)
    shutil.copy(voc / "classes.txt", root)
    return root


@pytest.fixture
def folder_line(folder_root, tmp_path):
    """folder_line(...) -> a command line on `folder_root`."""
    import helpers

    def line(**flags) -> list[str]:
        return helpers.argv(**{"dataset": "folder", "root": folder_root, "split": "random:4", "steps": 2,
                               **helpers.TINY, "out": tmp_path / "run", "warmup_epochs": 0, "log_every": 1, **flags})
    return line
