"""Types of Arrow's columns -> the types of what JSON, or a Python value, holds of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pyarrow as pa

from scorer.files.json_texts import MAX_DEPTH
from scorer.types import ScorerError

BINARY = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view)
LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)  # pyarrow's casts of views lose items
TEXT = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
FLAT = (pa.types.is_primitive, pa.types.is_null, *TEXT)

Refused = Mapping[str, tuple[Callable[[pa.DataType], bool], ...]]  # what can't be held -> the tests for its types
NOT_IN_TEXT: Refused = {"binary data": BINARY, "durations": (pa.types.is_duration,)}


def text_type(where: str, kind: pa.DataType) -> pa.DataType:
    """The type of what JSON holds for values of a type: text for dates, times and decimals, with every digit.

    Raises ScorerError, which begins with `where`, for binary values, durations and types that JSON can't hold.
    """
    return _mapped(where, kind, NOT_IN_TEXT, MAX_DEPTH)


def read_type(where: str, kind: pa.DataType) -> pa.DataType:
    """The same, but binary values stay, and durations are the text of their number."""
    return _mapped(where, kind, {}, MAX_DEPTH)


def alters(old: pa.DataType, new: pa.DataType) -> bool:
    """Whether Arrow's promotion of a type to `new` alters values: decimals to floats, or texts to binary values."""
    types = pa.types
    if old == new:
        return False
    if types.is_struct(old):
        return any(alters(field.type, new.field(field.name).type) for field in old)
    if types.is_map(old):
        return alters(old.key_type, new.key_type) or alters(old.item_type, new.item_type)
    if types.is_nested(old) or types.is_dictionary(old):
        return alters(old.value_type, getattr(new, "value_type", new))
    return (types.is_decimal(old) and types.is_floating(new)) or (
        any(is_text(old) for is_text in TEXT) and any(is_binary(new) for is_binary in BINARY)
    )


def without_views(kind: pa.DataType, *, dictionaries_only: bool = False) -> pa.DataType:
    """The type with plain texts and binary values in place of views: of all, or of those inside dictionaries.

    Where all are replaced, the fields inside have no metadata either.
    """
    types = pa.types

    def inside(field: pa.Field) -> pa.Field:
        field = field.with_type(without_views(field.type, dictionaries_only=dictionaries_only))
        return field if dictionaries_only else field.remove_metadata()

    if types.is_dictionary(kind):
        return pa.dictionary(kind.index_type, without_views(kind.value_type), kind.ordered)
    if types.is_struct(kind):
        return pa.struct([inside(field) for field in kind])
    if types.is_map(kind):
        return pa.map_(inside(kind.key_field), inside(kind.item_field), kind.keys_sorted)
    if types.is_fixed_size_list(kind):
        return pa.list_(inside(kind.value_field), kind.list_size)
    if types.is_list(kind) or types.is_large_list(kind):
        return (pa.list_ if types.is_list(kind) else pa.large_list)(inside(kind.value_field))
    if types.is_string_view(kind) and not dictionaries_only:
        return pa.large_string()
    if types.is_binary_view(kind) and not dictionaries_only:
        return pa.large_binary()
    return kind


def _mapped(where: str, kind: pa.DataType, refused: Refused, levels: int) -> pa.DataType:
    types = pa.types

    def inside(kind: pa.DataType, name: str = "") -> pa.DataType:
        return _mapped(f"{where}, {name}" if name else where, kind, refused, levels - 1)

    if isinstance(kind, pa.BaseExtensionType):
        return inside(kind.storage_type)
    if types.is_dictionary(kind):
        return inside(kind.value_type)
    if types.is_struct(kind) and levels and len({field.name for field in kind}) == kind.num_fields:
        return pa.struct([(field.name, inside(field.type, field.name)) for field in kind])
    if types.is_map(kind) and levels:
        return pa.list_(pa.struct([(f.name, inside(f.type)) for f in (kind.key_field, kind.item_field)]))
    if any(is_kind(kind) for is_kind in LISTS) and levels:
        return pa.large_list(inside(kind.value_type))
    if types.is_nested(kind):
        raise ScorerError(f"{where} holds {str(kind)[:60]}, which text can't hold; write to .parquet")
    return _flat_type(where, kind, refused)


def _flat_type(where: str, kind: pa.DataType, refused: Refused) -> pa.DataType:
    for what, kinds in refused.items():
        if any(is_kind(kind) for is_kind in kinds):
            raise ScorerError(f"{where} holds {what}, which text can't hold; leave it out, or write to .parquet")
    if pa.types.is_interval(kind) or not any(is_kind(kind) for is_kind in (*FLAT, *BINARY, pa.types.is_decimal)):
        raise ScorerError(f"{where} holds {str(kind)[:60]}, which text can't hold; write to .parquet")
    if pa.types.is_temporal(kind) or pa.types.is_decimal(kind):
        return pa.string()
    if any(is_kind(kind) for is_kind in BINARY):
        return pa.large_binary()
    if pa.types.is_null(kind):
        return pa.int8()  # of which all are null: pyarrow's cast of nulls to nulls fails inside lists
    if pa.types.is_string_view(kind):
        return pa.large_string()
    return pa.float32() if pa.types.is_float16(kind) else kind
