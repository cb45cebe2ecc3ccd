//! A disk with an empty database of PostgreSQL's, as `resources/fleets/counter/db.sh` makes it of a blank one. The example
//! fleets' tests begin with it: in a machine of an emulated host it would take minutes, and here it takes a second.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use crate::apt::{self, Package};
use crate::cache;

/// Raised when what is made changes.
const RECIPE: &str = "1";
const PACKAGE: &str = "postgresql-15";
const INITDB: &str = "/usr/lib/postgresql/15/bin/initdb";
/// As long as the disk that the fleets say, `data:1G`.
const SIZE: &str = "1G";
/// It guards nothing.
const PASSWORD: &str = "open sesame\n";

/// A folder with the disk, `data.img`, and the password of the database on it, `secret`.
pub(crate) fn disk() -> Result<PathBuf> {
    let version = Package::named(PACKAGE)?.version;
    cache::entry("database", &[&version, RECIPE], |dir| {
        // Whoever runs it must get there, which is not so for the cache.
        let place = tempfile::tempdir()?;
        let (secret, data) = (place.path().join("secret"), place.path().join("pg"));
        fs::write(&secret, PASSWORD)?;
        fs::copy(&secret, dir.join("secret"))?;
        let mut initdb = as_owner(place.path())?;
        initdb.arg(INITDB).args(["--no-sync", "-U", "postgres", "-A", "scram-sha-256", "--no-locale"]);
        apt::run(initdb.arg("--pwfile").arg(&secret).arg("-D").arg(&data))?;
        let mut hosts = fs::OpenOptions::new().append(true).open(data.join("pg_hba.conf"))?;
        hosts.write_all(b"host all all all scram-sha-256\n")?;
        fs::remove_file(secret)?;
        fs::write(place.path().join("ready"), "")?;
        let mut mkfs = Command::new("/sbin/mkfs.ext4");
        apt::run(mkfs.arg("-q").arg("-d").arg(place.path()).arg(dir.join("data.img")).arg(SIZE))
    })
}

/// A command of the folder's owner: PostgreSQL does nothing for root.
fn as_owner(folder: &Path) -> Result<Command> {
    let mut command = Command::new("env");
    if rustix::process::geteuid().is_root() {
        apt::run(Command::new("chown").arg("postgres:postgres").arg(folder))?;
        command = Command::new("setpriv");
        command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups"]);
    }
    command.current_dir(folder);
    Ok(command)
}
