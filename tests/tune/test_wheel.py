"""`layerzero-tune wheel`: what goes into it, what is refused, and that its bytes follow from the tables alone."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import keyword
import subprocess
import sys
import zipfile
from email import message_from_bytes
from importlib.metadata import EntryPoint, PathDistribution
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.metadata import Metadata
from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import Version

from layerzero_runtime.device import DeviceSpec
from layerzero_tune.wheel.archive import LATEST, archive
from layerzero_tune.wheel.build import build_wheel
from layerzero_tune.wheel.errors import WheelError
from layerzero_tune.wheel.naming import version_of_results, wheel_name
from layerzero_tune.wheel.table_folder import read_table, read_tables
from tests.tune.command import CommandsHere
from tests.tune.shipped_tables import OTHER_DEVICE, evaluation_of, write_norm_table
from tests.tune.synthetic_results import DEVICE

USAGE = 2


class TestNames:
    @given(
        st.from_regex(r"[A-Za-z][A-Za-z0-9._-]{0,20}[A-Za-z0-9]", fullmatch=True),
        st.sampled_from(["1", "1!2.0rc1+a.1"]),
    )
    def test_a_name_that_is_taken_gives_a_file_name_that_installers_read(self, name: str, version: str) -> None:
        try:
            named = wheel_name(name, version)
        except WheelError:
            package = canonicalize_name(name).replace("-", "_")
            assert keyword.iskeyword(package) or package in sys.stdlib_module_names
            return
        assert parse_wheel_filename(named.file_name)[:2] == (canonicalize_name(name), Version(version))
        assert named.package.isidentifier()

    @pytest.mark.parametrize(
        ("name", "version", "message"),
        [
            ("", "1", "--name is '', allowed: letters"),
            ("acme kernels", "1", "--name is 'acme kernels', allowed: letters"),
            ("-acme", "1", "a letter or digit at both ends"),
            ("../acme", "1", "allowed: letters"),
            ("acme\n", "1", "allowed: letters"),
            ("3d-kernels", "1", "package 3d_kernels is no name that Python can import"),
            ("class", "1", "package class is no name"),
            ("json", "1", "package json exists already; choose another"),
            ("LayerZero.Runtime", "1", "package layerzero_runtime exists already"),
            ("layerzero-dispatch", "1", "exists already"),
            ("acme", "one", "--version is 'one', required a version of PEP 440"),
            ("acme", "1.0-x/../y", "required a version of PEP 440"),
        ],
    )
    def test_what_cannot_be_a_distribution_is_refused(self, name: str, version: str, message: str) -> None:
        with pytest.raises(WheelError) as caught:
            wheel_name(name, version)
        assert message in str(caught.value)

    def test_newer_results_give_a_greater_version(self) -> None:
        days = ["2026-03-01T10:00:00+00:00", "2026-11-24T07:16:55+00:00", "2026-11-04T23:59:59+00:00"]
        assert version_of_results(days) == "2026.11.24"
        versions = [Version(version_of_results([day])) for day in sorted(days)]
        assert versions == sorted(versions)
        with pytest.raises(WheelError, match="the results end at 'today', which is no time"):
            version_of_results(["today"])


class TestWheel:
    def test_it_holds_modules_evidence_and_metadata_alone(self, two_tables: Path) -> None:
        first = two_tables / DEVICE.slug
        (first / "evaluation.json").write_text(evaluation_of(first))
        (first / "results").mkdir()
        (first / "results" / "part-1.parquet").touch()
        (first / "notes.txt").touch()
        (first / "__pycache__").mkdir()
        wheel = zipfile.ZipFile(BytesIO(build_wheel(wheel_name("Acme.Kernels", "1.0"), read_tables([two_tables]))))
        assert wheel.namelist() == [
            "acme_kernels/__init__.py",
            f"acme_kernels/{OTHER_DEVICE.slug}/__init__.py",
            f"acme_kernels/{OTHER_DEVICE.slug}/evidence.json",
            f"acme_kernels/{DEVICE.slug}/__init__.py",
            f"acme_kernels/{DEVICE.slug}/evaluation.json",
            f"acme_kernels/{DEVICE.slug}/evidence.json",
            "acme_kernels-1.0.dist-info/METADATA",
            "acme_kernels-1.0.dist-info/WHEEL",
            "acme_kernels-1.0.dist-info/entry_points.txt",
            "acme_kernels-1.0.dist-info/RECORD",
        ]
        assert wheel.read("acme_kernels/__init__.py") == b'"""Kernel tables of Acme.Kernels."""\n'
        for slug in (DEVICE.slug, OTHER_DEVICE.slug):
            for name in ("__init__.py", "evidence.json"):
                assert wheel.read(f"acme_kernels/{slug}/{name}") == (two_tables / slug / name).read_bytes()

    def test_its_metadata_is_what_installers_and_people_read(self, two_tables: Path, tmp_path: Path) -> None:
        first = two_tables / DEVICE.slug
        (first / "evaluation.json").write_text(evaluation_of(first))
        wheel = zipfile.ZipFile(BytesIO(build_wheel(wheel_name("Acme.Kernels", "1.0"), read_tables([two_tables]))))
        wheel.extractall(tmp_path / "site")
        info = tmp_path / "site" / "acme_kernels-1.0.dist-info"
        metadata = Metadata.from_email((info / "METADATA").read_bytes(), validate=True)
        assert (metadata.name, str(metadata.version)) == ("Acme.Kernels", "1.0")
        assert metadata.summary == "Measured kernel choices for Other CPU, Synthetic CPU"
        assert [str(requirement) for requirement in metadata.requires_dist or ()] == ["layerzero-dispatch"]
        description = metadata.description or ""
        provenance = read_table(first).table.provenance
        assert (
            f"results: {provenance['results']}, {provenance['measurements']} measurements, 2026-03-01T" in description
        )
        assert "physical cores 4" in description
        assert "| norm.rms | eager | 48 | 1.000 | 0.991 | 0.970 | 0.900 | 1.25x | - | 0 |" in description
        assert set(PathDistribution(info).entry_points) == {
            EntryPoint(slug, f"acme_kernels.{slug}", "layerzero.tables") for slug in (DEVICE.slug, OTHER_DEVICE.slug)
        }
        tags = message_from_bytes((info / "WHEEL").read_bytes())
        assert (tags["Root-Is-Purelib"], tags.get_all("Tag")) == ("true", ["py3-none-any"])

    def test_its_record_lists_every_file(self, two_tables: Path, tmp_path: Path) -> None:
        data = build_wheel(wheel_name("acme", "1.0"), read_tables([two_tables]))
        wheel = zipfile.ZipFile(BytesIO(data))
        record = list(csv.reader(wheel.read("acme-1.0.dist-info/RECORD").decode().splitlines()))
        assert [path for path, _, _ in record] == wheel.namelist()
        for path, digest, size in record[:-1]:
            content = wheel.read(path)
            expected = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
            assert (digest, int(size)) == (f"sha256={expected}", len(content))
        assert record[-1] == ["acme-1.0.dist-info/RECORD", "", ""]
        assert {entry.external_attr >> 16 for entry in wheel.infolist()} == {0o100644}
        (tmp_path / "acme.whl").write_bytes(data)
        subprocess.run([sys.executable, "-m", "zipfile", "-t", str(tmp_path / "acme.whl")], check=True, timeout=60)

    def test_a_device_with_a_name_of_several_lines_leaves_the_headers_whole(self, tmp_path: Path) -> None:
        device = DeviceSpec("cpu", "Odd\r\nRequires-Dist: evil\x00 CPU", "avx2", physical_cores=1, threads=1)
        write_norm_table(tmp_path, device)
        wheel = zipfile.ZipFile(BytesIO(build_wheel(wheel_name("acme", "1"), read_tables([tmp_path]))))
        metadata = Metadata.from_email(wheel.read("acme-1.dist-info/METADATA"), validate=True)
        assert metadata.summary == "Measured kernel choices for Odd Requires-Dist: evil CPU"
        assert len(metadata.requires_dist or ()) == 1


class TestArchive:
    def test_files_carry_the_time_that_is_asked_for(self) -> None:
        for modified, expected in ((0, (1980, 1, 1)), (1_700_000_000, (2023, 11, 14)), (LATEST, (2107, 12, 31))):
            entries = zipfile.ZipFile(BytesIO(archive({"a": b"1"}, "a-1.dist-info", modified))).infolist()
            assert {entry.date_time[:3] for entry in entries} == {expected}
        with pytest.raises(WheelError, match=f"SOURCE_DATE_EPOCH is {LATEST + 1}, allowed: at most {LATEST}"):
            archive({"a": b"1"}, "a-1.dist-info", LATEST + 1)


class TestCommand:
    def test_the_same_tables_give_the_same_bytes(
        self, command: CommandsHere, two_tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
        report = command("wheel", two_tables, "--name", "acme-kernels", "--out", tmp_path / "dist", "--json").json
        wheel = tmp_path / "dist" / "acme_kernels-2026.11.4-py3-none-any.whl"
        assert report == {
            "wheel": str(wheel),
            "name": "acme-kernels",
            "version": "2026.11.4",
            "package": "acme_kernels",
            "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
            "bytes": wheel.stat().st_size,
            "tables": {
                table.slug: json.loads(json.dumps(table.table.provenance)) for table in read_tables([two_tables])
            },
        }
        copy = tmp_path / "elsewhere"
        for device in (OTHER_DEVICE, DEVICE):
            write_norm_table(copy, device, "2026-11-04" if device is OTHER_DEVICE else "2026-03-01")
        folders = sorted(copy.iterdir(), reverse=True)
        ended = command("wheel", *folders, "--name", "acme-kernels", "--out", tmp_path / "again")
        assert ended.status == 0
        assert "next: pip install" in ended.output
        again = tmp_path / "again" / wheel.name
        assert again.read_bytes() == wheel.read_bytes()
        monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
        assert command("wheel", two_tables, "--name", "acme-kernels", "--out", tmp_path / "again").status == 0
        assert again.read_bytes() != wheel.read_bytes()
        assert zipfile.ZipFile(again).infolist()[0].date_time == (2023, 11, 14, 22, 13, 20)

    def test_a_version_can_be_given(self, command: CommandsHere, two_tables: Path, tmp_path: Path) -> None:
        report = command(
            "wheel", two_tables, "--name", "acme", "--version", "1.2-RC1", "--out", tmp_path / "dist", "--json"
        ).json
        assert report["version"] == "1.2rc1"
        assert [path.name for path in (tmp_path / "dist").iterdir()] == ["acme-1.2rc1-py3-none-any.whl"]

    def test_what_cannot_be_made_is_said(
        self, command: CommandsHere, two_tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").touch()
        for arguments, message in (
            (("--name", "a b", "--out", tmp_path / "dist"), "--name is 'a b', allowed"),
            (("--name", "acme", "--version", "new", "--out", tmp_path / "dist"), "--version is 'new', required"),
            (("--name", "acme", "--out", tmp_path / "file"), "choose another folder with --out"),
        ):
            ended = command("wheel", two_tables, *arguments)
            assert (ended.status, ended.output) == (1, "")
            assert message in " ".join(ended.errors.split())
        monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
        ended = command("wheel", two_tables, "--name", "acme", "--out", tmp_path / "dist")
        assert "SOURCE_DATE_EPOCH is 'yesterday', required whole seconds" in " ".join(ended.errors.split())
        assert not (tmp_path / "dist").exists()
        assert command("wheel", two_tables, "--out", tmp_path / "dist").status == USAGE
