/** The client of the `square` package, and the Square account that the customers of a file belong to. */
import { createHash } from "node:crypto";
import { createRequire } from "node:module";
import type { Database, SqlValue } from "sql.js";
import type { Square, SquareClient } from "square";
import { readDatabase } from "./database.ts";
import type { RunContext } from "./internal/cli.ts";
import { SyncError } from "./internal/errors.ts";
import { readRows } from "./internal/sql.ts";
import { createSquareError } from "./internal/square-errors.ts";
import { createStrictFetch, MAX_RETRIES, type Traffic } from "./internal/strict-fetch.ts";

const EXPIRY_WARNING_MS = 7 * 24 * 3_600_000;

/**
 * Loads the `square` package. That takes most of a second, so a run without requests does not do it.
 * `import()` takes longer: tsx would load each of its 3,600 CommonJS files through another thread.
 */
export function loadSquare(): typeof import("square") {
  return createRequire(import.meta.url)("square");
}

/** The row of square_account. */
export interface Account {
  environment: string;
  merchantId: string | null;
  /** SHA-256 of the token that was checked last. */
  tokenHash: string | null;
  /** RFC 3339; null if the token does not expire, or if that is unknown. */
  tokenExpiresAt: string | null;
}

/** Creates the client. It needs no file, so a script of your own that only reads can use it. */
export async function createSquareClient(
  settings: { token: string; baseUrl: string },
  traffic: Traffic = { requests: 0, retries: 0, unanswered: 0, squareTime: undefined },
  concurrency: number = 4,
): Promise<{ square: SquareClient; traffic: Traffic }> {
  const { SquareClient } = loadSquare();
  const square = new SquareClient({
    ...settings,
    maxRetries: MAX_RETRIES,
    // Includes the wait for other requests. The strict `fetch` limits the time of each reply.
    timeoutInSeconds: 600,
    fetch: await createStrictFetch(traffic, concurrency),
  });
  return { square, traffic };
}

/**
 * Creates the client of a run, and checks that the token belongs to the seller of the file. Only a
 * token that the file does not know yet costs a request.
 * @returns the client, and the account for {@linkcode saveAccount}
 * @throws SyncError (usage) if the file belongs to another seller or environment
 */
export async function connect(context: RunContext, concurrency?: number) {
  const { square: settings, databasePath, traffic, startedAt, warn } = context;
  const account = await readDatabase(databasePath, (db) => readAccount(db, context));
  const { square } = await createSquareClient(settings, traffic, concurrency);
  const tokenHash = createHash("sha256").update(settings.token).digest("hex");
  if (account.tokenHash !== tokenHash) {
    const { merchantId, expiresAt } = await retrieveTokenStatus(square, settings.environment);
    requireSameMerchant(databasePath, account, merchantId);
    account.tokenHash = tokenHash;
    account.tokenExpiresAt = expiresAt || null;
    account.merchantId ??= merchantId || null;
  }
  const expiry = account.tokenExpiresAt;
  if (expiry !== null && Date.parse(expiry) < startedAt + EXPIRY_WARNING_MS)
    warn(
      `the access token expires on ${expiry.slice(0, 10)}: replace SQUARE_ACCESS_TOKEN before that`,
    );
  return { square, account };
}

/**
 * Returns when a run began, by this computer's clock or by Square's, whichever is earlier. Call it
 * after the first reply. If this computer's clock is ahead, the watermark would be in Square's
 * future, and customers that are created until then would never be read.
 */
export function computeStartTime({ startedAt, traffic }: RunContext): number {
  return Math.min(startedAt, traffic.squareTime ?? startedAt);
}

/** @throws SyncError (usage) if the file belongs to another environment than this run */
export function readAccount(db: Database, { databasePath, square }: RunContext): Account {
  const [row = {}] = readRows(db, "SELECT * FROM square_account");
  const readText = (value: SqlValue | undefined) => (value ? String(value) : null);
  const environment = String(row.environment ?? square.environment);
  if (environment !== square.environment)
    throw createAccountError(databasePath, `Square (${environment})`, `(${square.environment})`);
  return {
    environment,
    merchantId: readText(row.merchant_id),
    tokenHash: readText(row.token_hash),
    tokenExpiresAt: readText(row.token_expires_at),
  };
}

/**
 * Saves the account of a run. Call it in each step that saves something of Square, because another
 * program may have replaced the file by one of another seller.
 */
export function saveAccount(db: Database, context: RunContext, account: Account): void {
  requireSameMerchant(context.databasePath, readAccount(db, context), account.merchantId);
  const sql = `INSERT OR REPLACE INTO square_account
    (only_row, environment, merchant_id, token_hash, token_expires_at) VALUES (1, ?, ?, ?, ?)`;
  db.run(sql, [account.environment, account.merchantId, account.tokenHash, account.tokenExpiresAt]);
}

/** If Square does not name the merchant of one of them, only the environments are compared. */
function requireSameMerchant(path: string, stored: Account, merchantId?: string | null): void {
  if (stored.merchantId && merchantId && stored.merchantId !== merchantId)
    throw createAccountError(path, `the merchant ${stored.merchantId}`, merchantId);
}

function createAccountError(path: string, owner: string, current: string): SyncError {
  return new SyncError(
    "usage",
    `Cannot use "${path}": it holds customers of ${owner}, and this run is for ${current}`,
    "another file with --db or DATABASE_PATH, or the token and SQUARE_ENVIRONMENT of this file",
  );
}

/** @see https://developer.squareup.com/reference/square/o-auth-api/retrieve-token-status */
async function retrieveTokenStatus(square: SquareClient, environment: string) {
  const request = square.oAuth.retrieveTokenStatus();
  return await request.catch((error): Square.RetrieveTokenStatusResponse => {
    // Square documents this request only for production. In the sandbox it may reject a valid
    // token, and an invalid one fails at the next request.
    const isMissing = error instanceof Error && "statusCode" in error && error.statusCode === 404;
    const isDenied = createSquareError(error, environment)?.kind === "denied";
    if (isMissing || (isDenied && environment === "sandbox")) return {};
    throw error;
  });
}
