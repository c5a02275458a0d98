//! The socket conformance suite: `run` is what people call (by `cargo xtask conformance`); `client` and
//! `peer` are the programs that it starts.

use std::io::Write;
use std::net::{Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use session_tests::conformance::{self, ClientArgs, Family, Second};

#[derive(Parser)]
#[command(about = "What applications see of sockets, natively and through Holdfast")]
struct Cli {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Run the cases and compare.
    Run {
        /// One JSON array.
        #[arg(long)]
        json: bool,
        /// Only cases whose names contain this; may be given several times.
        #[arg(long)]
        filter: Vec<String>,
        /// Only in this family.
        #[arg(long, value_parser = family)]
        family: Option<Family>,
        /// Write the table into this document.
        #[arg(long)]
        write_docs: Option<PathBuf>,
    },
    /// One case.
    Client {
        #[arg(long)]
        case: String,
        #[arg(long, value_parser = family)]
        family: Family,
        #[arg(long)]
        control: SocketAddr,
        #[arg(long)]
        link_local: Ipv6Addr,
    },
    /// The other end of all cases.
    Peer {
        #[arg(long)]
        control: SocketAddr,
    },
}

fn family(name: &str) -> Result<Family, String> {
    Family::named(name).ok_or_else(|| "expected v4, v6 or mapped".to_owned())
}

fn main() -> ExitCode {
    let done = match Cli::parse().what {
        What::Run {
            json,
            filter,
            family,
            write_docs,
        } => run(json, &filter, family, write_docs),
        What::Client {
            case,
            family,
            control,
            link_local,
        } => client(&ClientArgs {
            case,
            family,
            control,
            link_local,
        }),
        What::Peer { control } => conformance::peer(control).map(|()| ExitCode::SUCCESS),
    };
    done.unwrap_or_else(|error| {
        eprintln!("conformance: {error:#}");
        ExitCode::FAILURE
    })
}

fn client(args: &ClientArgs) -> anyhow::Result<ExitCode> {
    let outcome = conformance::client(args)?;
    say(&serde_json::to_string(&outcome)?)?;
    Ok(ExitCode::SUCCESS)
}

fn run(
    json: bool,
    filter: &[String],
    family: Option<Family>,
    document: Option<PathBuf>,
) -> anyhow::Result<ExitCode> {
    let program = session_user::bench::bed::own_program()?;
    let wanted = |case: &conformance::Case, of: Family| {
        let named = filter.is_empty() || filter.iter().any(|f| case.name.contains(f.as_str()));
        named && family.is_none_or(|f| f == of)
    };
    let results = conformance::run(&program, Second::Captured, wanted, |row| {
        // So that a long run is not silent; standard output has the result alone.
        let (family, took) = (row.family.name(), row.took.as_secs_f32());
        let verdict = row.verdict();
        eprintln!("{} {family}: {verdict} ({took:.1} s)", row.case);
        if !row.same {
            eprintln!("  {}", row.difference());
        }
    })?;
    if json {
        say(&conformance::print_json(&results.rows)?)?;
    } else {
        say(&conformance::print_table(&results.rows)?)?;
    }
    if let Some(document) = document {
        conformance::write_docs(&document, &results.rows)?;
    }
    let faults = results.faults();
    if faults.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!("{} runs are not as they should be:", faults.len());
    for fault in &faults {
        eprintln!("  {fault}");
    }
    Ok(ExitCode::FAILURE)
}

fn say(text: &str) -> std::io::Result<()> {
    std::io::stdout().lock().write_all(text.as_bytes())
}
