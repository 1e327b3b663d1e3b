"""Dataset files: upload, get, list, download, delete (contract 1.3).

An upload goes to a presigned URL and is then checked and registered by the server, which says which rows are wrong.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from rewardsmith import wire
from rewardsmith.client.objects import Dataset
from rewardsmith.client.transport import Data, Transport, segment
from rewardsmith.errors import DatasetError, RequestError
from rewardsmith.wire.base import Answer

DatasetRef = str | wire.Dataset
POLL_SECONDS = 1.0


class _Datasets(Answer):
    datasets: list[Dataset]


class DataFrame(Protocol):
    """What is used of a pandas.DataFrame; pandas itself is not needed here."""

    def to_json(self, path_or_buf: Any, **options: Any) -> Any: ...


class Datasets:
    """`rs.datasets`."""

    def __init__(self, transport: Transport) -> None:
        self._http = transport

    def from_file(self, file_path: str | Path, *, name: str | None = None, region: str | None = None) -> Dataset:
        """Upload a jsonl, json, csv or parquet file; the name defaults to that of the file without its suffix.

        Raises DatasetError with the rows and reasons when the file is refused.
        """
        path = Path(file_path).expanduser()
        if not path.is_file():
            raise DatasetError(f"there is no file {path}")
        ticket = self._http.call(
            "POST",
            "/v2/datasets/upload",
            wire.UploadTicket,
            body=wire.UploadRequest(file_name=path.name, region=region).model_dump(by_alias=True, exclude_none=True),
        )
        complete = wire.UploadComplete(name=name or path.stem, upload_token=ticket.upload_token)
        try:
            self._http.upload(ticket.presigned_url, path)
            # The token is used up by the first call that arrives, so a repetition could only mislead.
            dataset = self._http.call(
                "PUT", "/v2/datasets/upload", Dataset, body=complete.model_dump(by_alias=True), repeat=False
            )
        except RequestError as error:
            if error.code in (400, 413, 422):
                # The sentence names the file and its rows; the status would read like one of the columns.
                raise DatasetError(error.message.removesuffix(f" (HTTP {error.code})")) from None
            raise
        return self._connected(dataset)

    def from_pandas_dataframe(self, df: DataFrame, *, name: str | None = None, region: str | None = None) -> Dataset:
        """Upload the rows of a frame as JSON lines, so that numbers and lists keep their types."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{name or f'dataframe-{uuid4().hex[:8]}'}.jsonl".replace("/", "_")
            df.to_json(path, orient="records", lines=True, force_ascii=False, date_format="iso", double_precision=15)
            return self.from_file(path, name=name, region=region)

    def get(self, dataset_ref: DatasetRef) -> Dataset:
        """By name, `connection/name` or object."""
        connection, name = _connection_and_name(dataset_ref)
        return self._http.get(f"/v1/datasets/name/{segment(name)}", Dataset, {"connectionName": connection})

    def list(self) -> list[Dataset]:
        """The newest datasets first."""
        return self._http.get("/v2/datasets", Data[_Datasets]).data.datasets

    def delete(self, dataset_ref: DatasetRef) -> None:
        """Refused while a job that has not ended uses it."""
        self._http.send("DELETE", f"/v2/datasets/{segment(dataset_name(dataset_ref))}")

    def download(self, dataset_ref: DatasetRef, *, dest: str | Path) -> Path:
        """Save the rows under `dest`, which is a folder or a file name; the suffix of the format is appended."""
        name = dataset_name(dataset_ref)
        link = self._http.get(f"/v2/datasets/{segment(name)}/download-link", wire.DownloadLink)
        suffix = "." + link.file_extension.lstrip(".")
        target = Path(dest).expanduser()
        if target.is_dir():
            target = target / name
        if target.suffix != suffix:
            target = target.with_name(target.name + suffix)
        target.parent.mkdir(parents=True, exist_ok=True)
        self._http.download(link.url, target)
        return target

    def _connected(self, dataset: Dataset) -> Dataset:
        while dataset.status != "connected":
            if dataset.last_error:
                raise DatasetError(f"Dataset connection failed: {dataset.last_error}")
            time.sleep(POLL_SECONDS)
            dataset = self.get(dataset)
        return dataset


def dataset_name(ref: DatasetRef) -> str:
    return _connection_and_name(ref)[1]


def _connection_and_name(ref: DatasetRef) -> tuple[str, str]:
    if not isinstance(ref, str):
        return ref.connection.name, ref.name
    connection, slash, name = ref.rpartition("/")
    return (connection, name) if slash else (wire.DEFAULT_CONNECTION, name)
