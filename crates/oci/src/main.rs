//! `vmm-oci`: gets container images ready for `vmm`, which runs it; what it has in it is heavy, and no machine needs it.

use std::io::Write as _;
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, ensure};
use clap::{Parser, Subcommand};
use oci::cache::Cache;
use oci::{Patience, image};

/// Container images for vmm run --image
#[derive(Debug, Parser)]
#[command(name = "vmm image", version, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Fetches images anew, even those that are here
    Pull {
        /// HOST/NAME[:TAG|@DIGEST], oci:FOLDER[:TAG], oci-archive:FILE[:TAG], docker-archive:FILE[:TAG] or ./PATH
        #[arg(required = true)]
        references: Vec<String>,
    },
    /// Lists the images that are here
    Ls,
    /// Removes images
    Rm {
        /// As in vmm image ls
        #[arg(required = true, value_name = "REFERENCE|DIGEST")]
        images: Vec<String>,
    },
    /// Removes images that no reference means any more
    Prune {
        /// Removes all
        #[arg(long)]
        all: bool,
    },
    /// For vmm: prints where an image is and what runs in it, or why not, as JSON
    #[command(hide = true)]
    Get {
        /// As above
        reference: String,
    },
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("vmm image: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    let mut out = std::io::stdout().lock();
    if let Command::Get { reference } = command {
        let got = Cache::of_user().and_then(|cache| image::get(&cache, &reference, false, Patience::default()));
        let answer = match &got {
            Ok(image) => serde_json::json!({ "image": image }),
            Err(error) => serde_json::json!({ "error": format!("{error:#}") }),
        };
        writeln!(out, "{answer}").context("cannot print")?;
        return Ok(if got.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    let cache = Cache::of_user()?;
    match command {
        Command::Pull { references } => {
            for reference in references {
                let image = image::get(&cache, &reference, true, Patience::default())?;
                writeln!(out, "{reference} {}", image.digest).context("cannot print")?;
            }
        }
        Command::Ls => list(&cache, &mut out)?,
        Command::Rm { images } => {
            let locked = cache.lock()?;
            for image in images {
                // As it stands in the list, or as it was said.
                let whole = image
                    .parse::<oci::reference::Reference>()
                    .and_then(|reference| Ok(reference.absolute()?.to_string()));
                let found = locked.forget(&image)? || matches!(whole, Ok(whole) if locked.forget(&whole)?);
                ensure!(found, "there is no image {image} here: `vmm image ls` says which there are");
            }
        }
        Command::Prune { all } => writeln!(out, "{} freed", size(cache.lock()?.prune(all)?)).context("cannot print")?,
        Command::Get { .. } => unreachable!("it was dealt with above"),
    }
    Ok(ExitCode::SUCCESS)
}

/// Prints what is here, the newest first.
fn list(cache: &Cache, out: &mut impl std::io::Write) -> anyhow::Result<()> {
    let mut names = cache.names()?;
    names.sort_by_key(|named| std::cmp::Reverse(named.fetched));
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let width = names.iter().map(|named| named.reference.len()).max().unwrap_or(0).max("REFERENCE".len());
    writeln!(out, "{:width$}  {:71}  {:>9}  FETCHED", "REFERENCE", "DIGEST", "SIZE").context("cannot print")?;
    for named in names {
        let bytes = cache.size(&named.image).map_or_else(|| "gone".to_owned(), size);
        let age = age(now.saturating_sub(named.fetched));
        writeln!(out, "{:width$}  {:71}  {bytes:>9}  {age}", named.reference, named.digest).context("cannot print")?;
    }
    Ok(())
}

fn size(bytes: u64) -> String {
    match bytes {
        0..0x10_0000 => format!("{} KiB", bytes.div_ceil(1 << 10)),
        _ => format!("{} MiB", bytes.div_ceil(1 << 20)),
    }
}

fn age(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s ago"),
        120..7200 => format!("{} min ago", seconds / 60),
        7200..172_800 => format!("{} h ago", seconds / 3600),
        _ => format!("{} days ago", seconds / 86400),
    }
}
