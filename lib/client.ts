/** The `square` package's own client, made safe. Its typed calls stand where a script needs them. */
import type { SquareClient } from "square";
import type { DatabaseFile } from "./database.ts";
import { checkAccount } from "./internal/account.ts";
import type { RunContext } from "./internal/context.ts";
import { createStrictFetch, MAX_RETRIES } from "./internal/strict-fetch.ts";

/** The OAuth permissions of the Customers API. A personal access token has both. */
export const READ_CUSTOMERS = "CUSTOMERS_READ";
export const WRITE_CUSTOMERS = "CUSTOMERS_WRITE";

/**
 * Creates the client of the SDK and checks that the token belongs to the seller whose customers the file holds.
 * @param database the open file; it saves the checked account with its next update
 * @param options.scopes the permissions that the script needs
 * @param options.concurrency how many requests may run at the same time
 * @throws SyncError (usage) when the file belongs to another seller, (denied) when Square rejects the token or
 *   it lacks a permission
 */
export async function createSquareClient(
  context: RunContext,
  database: DatabaseFile,
  options: { scopes: readonly string[]; concurrency?: number },
): Promise<SquareClient> {
  // Loading the SDK takes most of a second. So it is loaded here, and not for --help or a run without requests.
  const { SquareClient } = await import("square");
  const square = new SquareClient({
    token: context.square.token,
    baseUrl: context.square.baseUrl,
    maxRetries: MAX_RETRIES,
    fetch: await createStrictFetch(context, options.concurrency ?? 1),
  });
  database.account = await checkAccount(square, context, database.account, options.scopes);
  return square;
}
