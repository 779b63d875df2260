//! An S3 server on loopback for tests, and faults between it and its clients.
//!
//! The server is [`s3s`] with the files of [`s3s_fs`], in this process: it checks signatures, and what it has is in
//! files that a test can look at and change. What it lacks [`Server`] adds: conditional puts that are atomic, and lists by
//! folder and in pages. [`Faults`] is between: it passes requests on, or does to them what a test wants. Nothing waits for time: a request that is held is held until it is let go.

#![forbid(unsafe_code)]

mod faults;
mod server;

pub use self::faults::{Fault, Faults, Request};
pub use self::server::{ACCESS_KEY, BUCKET, SECRET_KEY, Server};

/// The variables by which a client reaches an endpoint.
pub fn environment(endpoint: &str) -> Vec<(String, String)> {
    let variables = [
        ("AWS_ENDPOINT", endpoint),
        ("AWS_ACCESS_KEY_ID", ACCESS_KEY),
        ("AWS_SECRET_ACCESS_KEY", SECRET_KEY),
        ("AWS_REGION", "us-east-1"),
        ("AWS_ALLOW_HTTP", "true"),
    ];
    variables
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into()
}
