//! Standard output and standard error of commands. The only place that writes to them, so that a reader
//! that goes away (`| head`) ends no command in the middle of what it does, and is told nothing.
//!
//! SIGPIPE stays ignored, as Rust's runtime has it: it would end a measurement without its clean-up, and
//! also a command whose agent or child has gone, before it could say so.

use std::fmt::Display;
use std::io::{self, ErrorKind, Write};
use std::sync::atomic::{AtomicBool, Ordering};

/// Something that was to be printed is lost.
static LOST: AtomicBool = AtomicBool::new(false);

/// Prints `text` as it is.
pub fn print(text: &str) {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::BrokenPipe => {}
        Err(error) => {
            // Once: what follows would fail in the same way.
            if !LOST.swap(true, Ordering::Relaxed) {
                say(format_args!("holdfast: standard output: {error}"));
            }
        }
    }
}

/// Prints a line.
pub fn print_line(line: impl Display) {
    print(&format!("{line}\n"));
}

/// Says a line on standard error.
pub fn say(line: impl Display) {
    let mut err = io::stderr().lock();
    // There is nobody left to tell that it failed.
    let _ = err.write_all(format!("{line}\n").as_bytes());
}

/// Whether something that was printed could not be written, but for want of a reader.
pub fn has_lost() -> bool {
    LOST.load(Ordering::Relaxed)
}
