//! The `holdfast` program.

fn main() -> std::process::ExitCode {
    session_user::cli::main()
}
