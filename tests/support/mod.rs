//! Helpers shared by the integration tests: `it` compiles them once for its modules, and the other binaries include them.

#[cfg(any(feature = "postgres-tls", feature = "redis-tls"))]
mod certificates;
mod clock;
mod controlled_backend;
mod evidence;
#[cfg(any(feature = "postgres", feature = "redb", feature = "redis"))]
mod files;
#[cfg(any(feature = "postgres", feature = "redis"))]
mod interop;
#[cfg(any(feature = "postgres", feature = "redis"))]
mod load;
#[cfg(feature = "postgres")]
mod postgres_server;
mod process;
#[cfg(any(feature = "postgres", feature = "redis"))]
mod proxy;
#[cfg(any(feature = "postgres", feature = "redis"))]
mod race;
mod random;
#[cfg(feature = "redis")]
mod redis_server;
mod samplers;
mod spans;
mod threads;
mod worker;
#[cfg(any(feature = "postgres", feature = "redis"))]
mod writes;

#[cfg(any(feature = "postgres-tls", feature = "redis-tls"))]
pub(crate) use certificates::*;
pub(crate) use clock::*;
pub(crate) use controlled_backend::*;
pub(crate) use evidence::*;
#[cfg(any(feature = "postgres", feature = "redb", feature = "redis"))]
pub(crate) use files::*;
#[cfg(any(feature = "postgres", feature = "redis"))]
pub(crate) use interop::*;
#[cfg(any(feature = "postgres", feature = "redis"))]
pub(crate) use load::*;
#[cfg(feature = "postgres")]
pub(crate) use postgres_server::*;
pub(crate) use process::*;
#[cfg(any(feature = "postgres", feature = "redis"))]
pub(crate) use proxy::*;
#[cfg(any(feature = "postgres", feature = "redis"))]
pub(crate) use race::*;
pub(crate) use random::*;
#[cfg(feature = "redis")]
pub(crate) use redis_server::*;
pub(crate) use samplers::*;
pub(crate) use spans::*;
pub(crate) use threads::*;
pub(crate) use worker::*;
#[cfg(any(feature = "postgres", feature = "redis"))]
pub(crate) use writes::*;
