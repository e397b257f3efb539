"""Parquet files and Arrow tables to `Table`: one file, or a folder of them that is read as one."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llm_itemtok.data.columns import ArrowColumn, widened
from llm_itemtok.data.tables import Table, check_columns, fault, open_bytes


def read_parquet(path: Path, wanted: Mapping[str, str], required: Collection[str]) -> Table:
    """Read a Parquet file, or a folder of them, in the order of their names.

    Args:
        path: the file, packed with gzip or not; or a folder, as Spark and others write it. Files in it whose names do
            not end in `.parquet`, or begin with `_` or `.`, are not looked at.
        wanted: our name of a column to the file's. Columns that are not asked for are not read.
        required: those of our names that the file must have.

    Raises:
        DataError: for everything that can be wrong with the files or their columns, above all that the files of a
            folder have other columns, or other types, than the first. A column without any value fits every type.
    """
    files = shards(path) if path.is_dir() else [path]
    tables: list[pa.Table] = []
    names: dict[str, str] = {}
    there: Sequence[str] = ()
    schema = pa.schema([])
    for file in files:
        table, its_names, its_columns = _read_file(file, wanted, required)
        try:
            if tables and set(table.column_names) != set(schema.names):
                raise pa.ArrowTypeError("other columns")
            schema = pa.unify_schemas([schema, table.schema])
        except pa.ArrowException as error:
            expected, found = (
                ", ".join(f"{field.name}: {_kind(field.type)}" for field in each) for each in (schema, table.schema)
            )
            problem = f"the columns must be those of {files[0].name}, {expected}; was: {found}; write it again"
            raise fault(file, problem) from error
        tables.append(table)
        names, there = its_names, its_columns
    parts = [(str(file), table.num_rows) for file, table in zip(files, tables, strict=True)] if path.is_dir() else ()
    return table_of_arrow(str(path), pa.concat_tables(tables, promote_options="default"), names, there, parts)


def shards(folder: Path) -> list[Path]:
    """The Parquet files of a folder, in the order of their names.

    Raises:
        DataError: if there is none.
    """
    files = sorted(path for path in folder.glob("*.parquet") if path.is_file() and path.name[0] not in "._")
    if not files:
        raise fault(folder, "the folder must hold files whose names end in `.parquet`, found: none")
    return files


def _kind(kind: pa.DataType) -> str:
    return str(kind.value_type if pa.types.is_dictionary(kind) else kind)


def _read_file(
    path: Path, wanted: Mapping[str, str], required: Collection[str]
) -> tuple[pa.Table, dict[str, str], Sequence[str]]:
    try:
        with open_bytes(path) as source:
            schema = pq.ParquetFile(source).schema_arrow
            names = check_columns(path, schema.names, wanted, required)
            # Texts come as distinct ones and numbers, as they lie in the file.
            texts = [name for name in names.values() if _is_text(schema.field(name).type)]
            file = pq.ParquetFile(source, read_dictionary=texts)
            table = file.read(columns=list(names.values()))
            return pa.table(list(map(widened, table.columns)), names=table.column_names), names, schema.names
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise fault(path, f"the Parquet file is broken ({first}); write it again") from error


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def table_of_arrow(
    path: str,
    table: pa.Table,
    names: Mapping[str, str],
    there: Sequence[str],
    parts: Sequence[tuple[str, int]] = (),
) -> Table:
    """Take columns out of an Arrow table; times and dates become seconds.

    Args:
        path: for messages.
        table: with at least the columns of `names`.
        names: our name of a column to the table's.
        there: the names of all columns that could have been asked for.
        parts: where the rows are from several files, each with its number of them.

    Raises:
        DataError: if the table has no rows, or values that cannot be read.
    """
    if not table.num_rows:
        raise fault(path, "the file has columns but no rows")
    columns: dict[str, Sequence[Any]] = {}
    for ours, theirs in names.items():
        column = table.column(theirs)
        try:
            column.validate(full=True)  # texts that are not UTF-8
            columns[ours] = ArrowColumn(column)
        except (pa.ArrowException, UnicodeDecodeError) as error:
            raise fault(path, f"the values cannot be read ({error})", column=theirs) from error
    return Table(path, columns, range(1, table.num_rows + 1), names, there, parts)
