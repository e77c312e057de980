/**
 * Creates the client of the `square` package. paging.ts, push.ts and reconcile.ts call its methods,
 * for example `square.customers.search(…)`. This file adds what the package does not do: a `fetch`
 * that limits the rate and accepts only complete replies, and a check that the token belongs to the
 * seller of the file.
 */
import type { SquareClient } from "square";
import { readSomeIds } from "./customers.ts";
import type { DatabaseFile } from "./database.ts";
import { checkAccount } from "./internal/account.ts";
import type { RunContext } from "./internal/context.ts";
import { createStrictFetch, MAX_RETRIES } from "./internal/strict-fetch.ts";

// The OAuth permissions that the Customers API needs. A personal access token has both.
export const READ_CUSTOMERS = "CUSTOMERS_READ";
export const WRITE_CUSTOMERS = "CUSTOMERS_WRITE";

/**
 * Creates the client, and checks that the token belongs to the seller of the file's customers. If
 * the first reply shows that Square's clock is behind ours, context.startedAt becomes Square's
 * time.
 * @param database the open file; its next update saves the checked account
 * @param options.scopes the permissions that the script needs
 * @param options.concurrency how many requests may run at the same time; by default 1
 * @throws SyncError (usage) when the file belongs to another seller; (denied) when Square rejects
 *   the token, or the token lacks a permission
 */
export async function createSquareClient(
  context: RunContext,
  database: DatabaseFile,
  options: { scopes: readonly string[]; concurrency?: number },
): Promise<SquareClient> {
  // Loading the package takes most of a second. It is loaded here, so that --help and a run without
  // requests do not have to wait for it.
  const { SquareClient } = await import("square");
  const square = new SquareClient({
    token: context.square.token,
    baseUrl: context.square.baseUrl,
    maxRetries: MAX_RETRIES,
    fetch: await createStrictFetch(context, options.concurrency ?? 1),
  });
  // checkAccount compares the merchant of the token with the merchant of the file. If one of them
  // is unknown, it looks up some customers of the file instead. If Square has none of them, the
  // token belongs to another seller.
  const readIds = () => database.query(readSomeIds);
  const stored = database.account;
  const account = await checkAccount(square, context, stored, options.scopes, readIds);
  database.account = account; // The next update saves it.
  return square;
}
