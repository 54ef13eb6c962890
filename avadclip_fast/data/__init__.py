"""Lists, labels, feature files, ground truth and batches."""

from .atomic import atomic_write
from .check import check_list
from .dataset import Batch, FeatureSet, TestVideo, epoch_order, pack, packed_rows, test_videos
from .errors import DataError, LabelError
from .features import chunk, load_features, pool, snippet_count, with_motion, write_features
from .ground_truth import (
    Span,
    frame_vector,
    read_annotations,
    read_frame_gt,
    read_object_array,
    read_segments_json,
    read_spans,
    segments,
)
from .labels import CCTV_FIGHTS, PRESETS, XD_VIOLENCE, Preset, encode, one_kind
from .lists import Row, read_list, split, video_of, videos, write_list
from .packed import check_packed
from .synthetic import make_synthetic

__all__ = [
    "CCTV_FIGHTS",
    "PRESETS",
    "XD_VIOLENCE",
    "Batch",
    "DataError",
    "FeatureSet",
    "LabelError",
    "Preset",
    "Row",
    "Span",
    "TestVideo",
    "atomic_write",
    "check_list",
    "check_packed",
    "chunk",
    "encode",
    "epoch_order",
    "frame_vector",
    "load_features",
    "make_synthetic",
    "one_kind",
    "pack",
    "packed_rows",
    "pool",
    "read_annotations",
    "read_frame_gt",
    "read_list",
    "read_object_array",
    "read_segments_json",
    "read_spans",
    "segments",
    "snippet_count",
    "split",
    "test_videos",
    "video_of",
    "videos",
    "with_motion",
    "write_features",
    "write_list",
]
