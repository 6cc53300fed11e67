//! A shop that takes an order by HTTP and carries it out step by step from a task queue, and a bank in a second process, which
//! refuses at first. Both send their spans by OTLP. `scripts/service` runs them with Phoenix as the collector.
//!
//! ```sh
//! cd examples/service
//! cargo run -- bank &
//! cargo run -- shop &          # or `shop plain`: with the plain OpenTelemetry layer
//! curl -X POST 127.0.0.1:8080/orders/order-42
//! ```

mod bank;
mod http;
mod queue;
mod shop;
mod telemetry;

use std::error::Error;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

#[tokio::main]
async fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["bank"] => {
            let provider = telemetry::plain("bank")?;
            http::serve("BANK", bank::ADDRESS, bank::router()).await?;
            Ok(provider.shutdown()?)
        }
        ["shop", ref layer @ ..] => {
            let provider = match layer {
                [] => telemetry::with_workflows("shop")?,
                ["plain"] => telemetry::plain("shop")?,
                _ => {
                    return Err(
                        format!("unknown layer {layer:?}: leave it out, or say \"plain\"").into(),
                    );
                }
            };
            http::serve("SHOP", shop::ADDRESS, shop::router()).await?;
            Ok(provider.shutdown()?) // or the last spans are lost
        }
        _ => Err("usage: service-example bank | shop [plain]".into()),
    }
}
