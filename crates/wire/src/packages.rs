//! Packages in a cell: where they are, and what code is told of them. There is no request of their own; they are installed by commands, and fetched by the way out.

/// The folder, beside the guest, of what each Python imports first.
pub const PYTHON_DIR: &str = "/cellblock/python";
/// The folder, in the working folder, of packages that a session has installed.
pub const PACKAGES_NAME: &str = ".packages";
/// Tells code which packages may be installed: `none`, `any`, or their names.
pub const PACKAGES_VARIABLE: &str = "CELLBLOCK_PACKAGES";
/// Tells it where the working folder is, where that is not [`WORKDIR`](crate::link::WORKDIR).
pub const WORKDIR_VARIABLE: &str = "CELLBLOCK_WORKDIR";
/// Tells it how many bytes they may add.
pub const PACKAGES_BYTES_VARIABLE: &str = "CELLBLOCK_PACKAGES_BYTES";
