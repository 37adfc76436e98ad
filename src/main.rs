//! The `sarang` command. Everything happens in [`sarang::cli`]; this maps its result to an exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(sarang::cli::main())
}
